/* Memory regions: of what is lent to peers, by grant (keys.c makes these), and of local memory, where that is asked for, by region. */

#include "fabric.h"

#include "lane/own.h"

#include <stdlib.h>
#include <string.h>

int at_fab_register(at_fab *fab, const at_fab_memory *wanted, unsigned use, at_fab_mr *out) {
    at_fab_memory memory = *wanted;
    if (memory.nbytes == 0) /* there is no memory to name, and none will be written */
        memory = (at_fab_memory){(uint64_t)(uintptr_t)fab->signal_target, 1, -1, -1, 0};
    (void)pthread_mutex_lock(&fab->lock);
    int rc = fab->driver->enroll(fab, &memory, use, out);
    (void)pthread_mutex_unlock(&fab->lock);
    if (rc != 0) {
        fab->rail.lane->oserror = rc;
        out->mr = NULL;
        return AT_EIO;
    }
    out->base = at_fab_is(fab, AT_FAB_VIRTUAL) ? memory.address : 0;
    return AT_OK;
}

int at_fab_register_host(at_fab *fab, void *base, uint64_t nbytes, unsigned use, at_fab_mr *out) {
    at_fab_memory memory = {(uint64_t)(uintptr_t)base, nbytes, -1, -1, 0};
    return at_fab_register(fab, &memory, use, out);
}

at_fab_memory at_fab_part_of(const at_region *region, uint64_t offset, uint64_t nbytes) {
    return (at_fab_memory){(uint64_t)(uintptr_t)region->base + offset, nbytes, region->cuda, region->dmabuf_fd, region->dmabuf_start};
}

void at_fab_unregister(at_fab *fab, at_fab_mr *mr) {
    if (mr->mr == NULL) return;
    (void)pthread_mutex_lock(&fab->lock);
    fab->driver->dismiss(fab, mr->mr);
    (void)pthread_mutex_unlock(&fab->lock);
    mr->mr = NULL;
}

void *at_fab_grown(void *items, uint32_t *room, uint32_t index, size_t each) {
    uint32_t next = *room ? *room : 64;
    while (next <= index) next *= 2;
    uint8_t *more = realloc(items, next * each);
    if (more == NULL) return NULL;
    memset(more + *room * each, 0, (next - *room) * each);
    *room = next;
    return more;
}

/* ---- local memory ---- */

int at_fab_source(at_fab *fab, const at_op *op, void **desc) {
    *desc = NULL;
    if (op->region == NULL || op->region->nbytes == 0 || (!at_fab_is(fab, AT_FAB_LOCAL_MR) && op->region->cuda < 0)) return AT_OK;
    uint32_t index = op->region_index;
    if (index >= fab->local_room) {
        void *more = at_fab_grown(fab->local, &fab->local_room, index, sizeof *fab->local);
        if (more == NULL) return AT_EAGAIN;
        fab->local = more;
    }
    if (fab->local[index] == NULL) {
        at_fab_mr fresh;
        at_fab_memory memory = at_fab_part_of(op->region, 0, op->region->nbytes);
        int rc = at_fab_register(fab, &memory, AT_USE_LOCAL, &fresh);
        if (rc != AT_OK) return rc;
        fab->local[index] = fresh.mr;
    }
    *desc = fab->driver->desc(fab->local[index]);
    return AT_OK;
}

int at_fab_bounce(at_fab *fab, const at_op *op, at_fab_wr *wr, at_fab_vector *v) {
    if (op->region == NULL || !op->region->file || v->bytes == 0 || op->region->cuda >= 0 || at_fab_is(fab, AT_FAB_LOCAL_MR)) return AT_OK;
    if (op->stage != NULL) return AT_OK; /* a copy already, by a copier */
    wr->pooled = v->bytes > AT_FAB_PIECE / 16 && v->bytes <= AT_FAB_PIECE;
    if (wr->pooled && fab->bounce_count != 0) wr->bounce = fab->bounces[--fab->bounce_count];
    else wr->bounce = malloc(wr->pooled ? (size_t)AT_FAB_PIECE : (size_t)v->bytes);
    if (wr->bounce == NULL) return AT_EAGAIN;
    wr->lands = op->kind & AT_OP_READ ? v->here[0] : NULL; /* one piece: so pages are gathered that land here */
    uint64_t at = 0;
    for (uint32_t i = 0; i < v->count; i++) {
        if (wr->lands == NULL && at_own_copy(wr->bounce + at, v->here[i], v->nbytes[i]) != 0) return AT_EMEMORY;
        v->here[i] = wr->bounce + at;
        at += v->nbytes[i];
    }
    return AT_OK;
}

int at_fab_landed(at_fab_wr *wr) {
    int error = wr->lands != NULL ? at_own_copy(wr->lands, wr->bounce, wr->bytes) : 0;
    return error == 0 ? AT_OK : AT_EMEMORY;
}

void at_fab_bounce_free(at_fab *fab, at_fab_wr *wr) {
    if (wr->bounce != NULL && wr->pooled && fab->bounce_count < AT_FAB_BOUNCES) fab->bounces[fab->bounce_count++] = wr->bounce;
    else free(wr->bounce);
    wr->bounce = wr->lands = NULL;
}

void at_fab_region_over(at_rail *rail, uint32_t region) {
    at_fab *fab = (at_fab *)rail;
    if (region >= fab->local_room) return;
    at_fab_mr mr = {.mr = fab->local[region]};
    at_fab_unregister(fab, &mr);
    fab->local[region] = NULL;
}

void at_fab_memory_close(at_fab *fab) {
    at_fab_unregister(fab, &fab->signal_target_mr);
    for (uint32_t i = 0; i < fab->exported_room; i++) at_fab_unregister(fab, &fab->exported[i]);
    for (uint32_t i = 0; i < fab->local_room; i++)
        if (fab->local[i] != NULL) fab->driver->dismiss(fab, fab->local[i]);
    free(fab->exported);
    free(fab->local);
}
