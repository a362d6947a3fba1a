/* Loading libfabric, and what is there when its headers were not.
 *
 * Only seven functions are symbols of the library; everything else goes through tables of function pointers in its objects. Its
 * structures only ever grow at the end, so that a build with old headers runs with newer libraries as long as it lets the library make
 * them (fi_dupinfo) and never copies or measures them. */
#if !__has_include(<rdma/fabric.h>) || !__has_include(<rdma/fi_rma.h>)

#include "fabric/fabric.h"

#include "ofi/decls.h"

#define ABSENT(type, call, value) \
    type call { return value; }
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
ABSENT(int, at_ofi_built(void), 0)
ABSENT(int, at_ofi_load(const char *path), AT_EUNKNOWN)
ABSENT(uint32_t, at_ofi_version(void), 0)
ABSENT(int, at_ofi_facts_of(int device, uint64_t order, uint64_t data_bytes, int mr_mode, uint64_t most_rma, int emulated, uint32_t without,
                            at_fab_facts *out), AT_EUNKNOWN)
ABSENT(int, at_ofi_attributes_of(const at_fab_memory *memory, uint64_t access, uint64_t key, uint64_t out[10]), AT_EUNKNOWN)
ABSENT(int, at_ofi_open(at_lane *lane, const at_ofi_options *options, at_fab **out, at_fab_facts *facts), AT_EUNKNOWN)
#pragma GCC diagnostic pop

#else

#include "ofi.h"

#include <dlfcn.h>
#include <string.h>

struct at_ofi_calls at_ofi_library;
static pthread_mutex_t loading = PTHREAD_MUTEX_INITIALIZER;
static int loaded;

int at_ofi_built(void) { return FI_MAJOR_VERSION << 16 | FI_MINOR_VERSION; }
uint32_t at_ofi_version(void) { return at_ofi_library.version != NULL ? at_ofi_library.version() : 0; }

/* A function of the library; ISO C has no conversion between the two kinds of pointer, POSIX promises that they are alike. */
static int find(void *library, const char *name, void *where) {
    void *symbol = dlsym(library, name);
    if (symbol == NULL) {
        at_fab_say("it lacks %s", name);
        return AT_EIO;
    }
    memcpy(where, &symbol, sizeof symbol);
    return AT_OK;
}

int at_ofi_load(const char *path) {
    int rc = AT_OK;
    (void)pthread_mutex_lock(&loading);
    if (!loaded) {
        struct at_ofi_calls calls;
        void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (library == NULL) {
            at_fab_say("%s", dlerror());
            rc = AT_EIO;
        } else if ((rc = find(library, "fi_getinfo", &calls.getinfo)) != AT_OK || (rc = find(library, "fi_freeinfo", &calls.freeinfo)) != AT_OK ||
                   (rc = find(library, "fi_dupinfo", &calls.dupinfo)) != AT_OK || (rc = find(library, "fi_fabric", &calls.fabric)) != AT_OK ||
                   (rc = find(library, "fi_version", &calls.version)) != AT_OK || (rc = find(library, "fi_strerror", &calls.strerror)) != AT_OK) {
            (void)dlclose(library);
        } else {
            at_ofi_library = calls;
            loaded = 1; /* for good: threads of the library may outlive everything that we close */
        }
    }
    (void)pthread_mutex_unlock(&loading);
    return rc;
}

#endif
