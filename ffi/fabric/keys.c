/* Keys: of memory of ours, given to one peer after the other, and of theirs.
 *
 * A grant's region ends only when the grant has been proved to be over: a write that the other side had posted under a key that is gone
 * would tear the connection down, and others' writes with it. */

#include "fabric.h"

int at_fab_export_key(at_lane *lane, int64_t peer, int64_t slot, uint64_t epoch, int64_t region_id, uint64_t offset, uint64_t nbytes, int access,
                uint64_t *address, uint64_t *key) {
    int rc = AT_EPEER;
    at_lock(lane);
    at_fab_conn *conn = at_fab_conn_of(lane, peer);
    if (conn == NULL || conn->peer->status != AT_OK) goto out;
    rc = AT_ESTALE;
    const at_region *region = at_region_use(lane, region_id);
    if (!at_grant_valid(lane, slot, epoch) || region == NULL) goto out;
    at_fab *fab = conn->fab;
    rc = AT_EDEVICE;
    if (region->cuda >= 0 && !at_fab_is(fab, AT_FAB_DEVICE)) goto out;
    /* Its library would touch the memory itself, and a page that is gone would end this process. Shared memory (/dev/shm, memfds) is
     * lent all the same: programs shorten files, not that, and what torch and multiprocessing share is of this kind. */
    rc = AT_EFILE;
    if (region->slow && !at_fab_is(fab, AT_FAB_LOCAL_MR)) goto out;
    uint32_t index = (uint32_t)slot;
    rc = AT_ENOMEM;
    if (index >= fab->exported_room) {
        void *more = at_fab_grown(fab->exported, &fab->exported_room, index, sizeof *fab->exported);
        if (more == NULL) goto out;
        fab->exported = more;
    }
    if (index >= conn->hold_room) {
        void *more = at_fab_grown(conn->hold, &conn->hold_room, index, 1);
        if (more == NULL) goto out;
        conn->hold = more;
    }
    at_fab_mr *mr = &fab->exported[index];
    unsigned rights = (access & AT_ACCESS_WRITE ? AT_USE_REMOTE_WRITE : 0u) | (access & AT_ACCESS_READ ? AT_USE_REMOTE_READ : 0u);
    at_fab_memory memory = at_fab_part_of(region, offset, nbytes);
    rc = mr->mr != NULL ? AT_OK : at_fab_register(fab, &memory, rights, mr);
    if (rc != AT_OK) goto out;
    conn->hold[index] = AT_HOLD_LENT;
    *address = mr->base;
    *key = mr->key;
out:
    at_unlock(lane);
    return rc;
}

void at_fab_grant_over(at_rail *rail, uint32_t slot) {
    at_fab *fab = (at_fab *)rail;
    if (slot < fab->exported_room) at_fab_unregister(fab, &fab->exported[slot]);
    for (uint32_t i = 0; i < fab->conn_count; i++)
        if (fab->conns[i] != NULL && slot < fab->conns[i]->hold_room) fab->conns[i]->hold[slot] = AT_HOLD_NONE;
}

int64_t at_fab_import_key(at_lane *lane, int64_t peer, uint64_t address, uint64_t key, uint64_t nbytes, int access, uint32_t slot,
                      uint64_t epoch) {
    at_lock(lane);
    at_fab_conn *conn = at_fab_conn_of(lane, peer);
    int rc = conn == NULL || conn->peer->status != AT_OK ? AT_EPEER : slot >= AT_GRANTS || (epoch & 1u) == 0 ? AT_EPROTO : AT_OK;
    if (rc == AT_OK) {
        _Atomic uint64_t *word = &conn->words->epoch[slot]; /* epochs of a slot only rise: a control message may have come before this */
        uint64_t known = atomic_load(word);
        if (known < epoch) atomic_store(word, epoch);
        else if (known > epoch) rc = AT_ESTALE;
    }
    at_unlock(lane);
    if (rc != AT_OK) return rc;
    int64_t remote = at_remote_add(lane, peer, NULL, address, nbytes, access, slot, epoch);
    if (remote < 0) return remote;
    at_lock(lane);
    at_remote *known = at_remote_use(lane, remote);
    if (known != NULL) known->key = key;
    at_unlock(lane);
    return remote;
}
