/* Loading libibverbs, and what is there when its headers were not.
 *
 * The calls of the fast path (posting, polling, arming) are inline functions of the headers that go through tables in the library's
 * objects; the others are looked up by name here, in their newest version. */
#if !__has_include(<infiniband/verbs.h>)

#include "fabric/fabric.h"

#include "verbs/decls.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
int at_verbs_built(void) { return 0; }
int at_verbs_load(const char *path) { return AT_EUNKNOWN; }
int at_verbs_open(at_lane *lane, const char *device, const char *node, uint64_t most_bytes, uint32_t most_posted, at_fab **out, at_fab_facts *facts) {
    return AT_EUNKNOWN;
}
uint32_t at_verbs_flags(void) { return 0; }
int at_verbs_posts(at_lane *lane, int64_t peer, uint64_t out[4]) { return AT_EUNKNOWN; }
#pragma GCC diagnostic pop

#else

#include "verbs.h"

#include <dlfcn.h>
#include <string.h>

struct at_vrb_calls at_vrb_library;
static pthread_mutex_t loading = PTHREAD_MUTEX_INITIALIZER;
static int loaded;

int at_verbs_built(void) { return 1; }

/* In the order of the struct. ISO C has no conversion between the two kinds of pointer, POSIX promises that they are alike. */
static const char *const names[] = {
    "ibv_get_device_list", "ibv_free_device_list", "ibv_get_device_name", "ibv_open_device", "ibv_close_device", "ibv_query_device",
    "ibv_query_port", "_ibv_query_gid_ex", "ibv_alloc_pd", "ibv_dealloc_pd", "ibv_reg_mr_iova2", "ibv_reg_dmabuf_mr", "ibv_dereg_mr",
    "ibv_create_comp_channel", "ibv_destroy_comp_channel", "ibv_create_cq", "ibv_destroy_cq", "ibv_get_cq_event", "ibv_ack_cq_events",
    "ibv_create_srq", "ibv_destroy_srq", "ibv_create_qp", "ibv_modify_qp", "ibv_destroy_qp", "ibv_get_async_event", "ibv_ack_async_event",
};
_Static_assert(sizeof names / sizeof names[0] == sizeof(struct at_vrb_calls) / sizeof(void *), "a name for each call");

static int find_all(void *library, struct at_vrb_calls *calls) {
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        void *symbol = dlsym(library, names[i]);
        if (symbol == NULL && strcmp(names[i], "ibv_reg_dmabuf_mr") != 0) {
            at_fab_say("it lacks %s: too old", names[i]);
            return AT_EIO;
        }
        memcpy((uint8_t *)calls + i * sizeof symbol, &symbol, sizeof symbol);
    }
    return AT_OK;
}

int at_verbs_load(const char *path) {
    int rc = AT_OK;
    (void)pthread_mutex_lock(&loading);
    if (!loaded) {
        struct at_vrb_calls calls;
        void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (library == NULL) {
            at_fab_say("%s", dlerror());
            rc = AT_EIO;
        } else if ((rc = find_all(library, &calls)) != AT_OK) {
            (void)dlclose(library);
        } else {
            at_vrb_library = calls;
            loaded = 1;
        }
    }
    (void)pthread_mutex_unlock(&loading);
    return rc;
}

#endif
