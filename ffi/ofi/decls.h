/* ofi: tcp and efa by libfabric (OpenFabrics Interfaces). A driver of the fabric provider: see fabric/decls.h for everything but opening.
 *
 * libfabric is opened at run time. Where its headers were missing at build time, at_ofi_built is 0 and at_ofi_open answers AT_EUNKNOWN. */

typedef struct {
    const char *provider; /* libfabric's name of it */
    const char *fabric;   /* its fabric of this name, or NULL for whichever comes first */
    const char *node;     /* the local address to be reached at, or NULL for the provider's own choice */
    int device_memory;    /* ask for AT_FAB_DEVICE first, and do without where that is refused; efa is asked in any case */
    uint32_t without;     /* at_fab_flags to do without although they are there: tests of what other fabrics lack */
    uint64_t most_bytes;  /* of one work request, 0: as many as the provider takes */
    uint32_t most_posted; /* work requests of the rail, 0: no bound but that of each peer */
    uint16_t first_port, last_port; /* of its endpoints, one for each peer, where they have ports; 0: any */
} at_ofi_options;

int at_ofi_built(void); /* the version of libfabric whose headers were there: major << 16 | minor; 0: none */
/* Load the library of this process, once: AT_OK also when it is loaded already, AT_EIO with the reason in at_fab_why. */
int at_ofi_load(const char *path);
uint32_t at_ofi_version(void); /* of the loaded library: major << 16 | minor; 0: none */

/* Tests: what a rail would be whose library said so. `device`: EFA rather than software. order, mr_mode: as fi_info has them. */
int at_ofi_facts_of(int device, uint64_t order, uint64_t data_bytes, int mr_mode, uint64_t most_rma, int emulated, uint32_t without,
                    at_fab_facts *out);
/* Tests: flags, pieces, access, key, interface, ordinal, address, length, offset and descriptor that libfabric would be told. */
int at_ofi_attributes_of(const at_fab_memory *memory, uint64_t access, uint64_t key, uint64_t out[10]);

/* A rail of the lane: AT_OK, AT_EIO (see at_fab_why) or AT_E*. It lives as long as the lane. May take half a second; any thread. */
int at_ofi_open(at_lane *lane, const at_ofi_options *options, at_fab **out, at_fab_facts *facts);
