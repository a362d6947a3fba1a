/* verbs: RDMA NICs by libibverbs, reliable connections set up over control. A driver of the fabric provider: see fabric/decls.h for
 * everything but opening.
 *
 * libibverbs is opened at run time. Where its headers were missing at build time, at_verbs_built is 0. */

int at_verbs_built(void); /* 1, or 0: built without the headers of libibverbs */
/* Load the library of this process, once: AT_OK also when it is loaded already, AT_EIO with the reason in at_fab_why. */
int at_verbs_load(const char *path);
/* A rail of the lane on the named device (NULL: any). `node`: the local IPv4 or IPv6 address that it had best be reached by, or NULL.
 * most_bytes, most_posted: as in at_ofi_options. AT_OK, AT_EIO (see at_fab_why) or AT_E*. Any thread. */
int at_verbs_open(at_lane *lane, const char *device, const char *node, uint64_t most_bytes, uint32_t most_posted, at_fab **out, at_fab_facts *facts);
/* What every rail of verbs is (at_fab_flags), but for AT_FAB_DEVICE, which the device decides; 0: built without the headers. */
uint32_t at_verbs_flags(void);
/* How many calls to the driver have posted how many work requests to this peer in its present connection; of these, how many were
 * inline, and how many asked for a completion. AT_EUNKNOWN: no such peer. */
int at_verbs_posts(at_lane *lane, int64_t peer, uint64_t out[4]);
