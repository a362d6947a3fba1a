/* Local memory that can block the thread that touches it, for ports that only post work requests. What a port has been given is read or
 * written by a library, a device or the loop's thread, with locks held. So a copier touches such memory first, outside of the lock.
 *
 * Pages that are not there yet (resident.c) are fetched, and then they are posted as they are. A file on a file system that takes its time
 * can lose its pages again. So the port is given a copy, STAGE bytes of the operation at a time:
 *
 *   a write    copier: memory -> copy | port: posts it, all of it lands | copier: the next part | ...
 *   a read     port: reads into the copy, all of it lands | copier: copy -> memory | port: the next part | ... | copier: the last one
 *
 * The steps that are not in the copy yet are the operation's tail, which waits until all others have landed. A read has one step more than
 * are posted: the last copy into memory. While there is a copy, the operation's local address, stride and page table are those of the copy;
 * a port sees no difference. A copy is never changed or freed while something of it is posted or may be posted again.
 *
 * Where a rail registers local memory with a device (peer->pins), its pages stay, and are only fetched. */
#include "stage.h"

#include <stdlib.h>

#include "own.h"

#define STAGE ((uint64_t)8 << 20) /* at least one step, however large that is */

struct at_stage {
    uint8_t *local; /* the operation's own, as it was */
    const int64_t *pages;
    uint64_t stride, tail;
    uint64_t begin, end; /* the steps that are in the copy */
    uint64_t steps;      /* of bytes, of the whole operation */
    uint64_t pieces;     /* steps of one unit */
    uint64_t most, room; /* steps and bytes that there is room for */
    int reads, more;     /* more: a copier goes on when all of it has landed */
    int64_t *order;      /* 0, 1, 2, ...: where pages are in the copy; NULL: there are none */
    uint8_t bytes[];
};

/* Where a step begins, were all units one behind the other. */
static uint64_t place(const at_stage *stage, const at_op *op, uint64_t step) {
    return step / stage->pieces * op->nbytes + step % stage->pieces * op->piece;
}

static at_stage *made(const at_op *op) {
    uint64_t pieces = op->piece == 0 || op->nbytes <= op->piece ? 1 : (op->nbytes - 1) / op->piece + 1;
    uint64_t each = pieces == 1 ? op->nbytes : op->piece, most = each < STAGE ? STAGE / each : 1, whole = op->nbytes * op->units;
    uint64_t room = most * each < whole ? most * each : whole;
    at_stage *stage = malloc(sizeof *stage + (size_t)room);
    if (stage == NULL) return NULL;
    *stage = (at_stage){.local = op->local, .pages = op->local_pages, .stride = op->local_stride, .tail = op->tail,
                        .steps = pieces * op->units, .pieces = pieces, .most = most, .room = room, .reads = op->kind & AT_OP_READ};
    if (!(op->kind & AT_OP_PAGES)) return stage;
    stage->order = malloc((size_t)op->units * sizeof *stage->order);
    for (uint64_t i = 0; stage->order != NULL && i < op->units; i++) stage->order[i] = (int64_t)i;
    if (stage->order != NULL) return stage;
    free(stage);
    return NULL;
}

/* Between the copy and memory: to memory, what has been read; else from there. 0, or EFAULT. */
static int exchange(at_stage *stage, const at_op *op, int to_memory) {
    uint64_t n = stage->end - stage->begin, first = place(stage, op, stage->begin);
    const int64_t *pages = stage->pages + stage->begin;
    if (!(op->kind & AT_OP_PAGES)) {
        uint64_t end = stage->end == stage->steps ? op->nbytes : place(stage, op, stage->end);
        uint8_t *memory = stage->local + first;
        return to_memory ? at_own_copy(memory, stage->bytes, end - first) : at_own_copy(stage->bytes, memory, end - first);
    }
    if (stage->pieces == 1 && to_memory) return at_own_copy_pages(stage->local, stage->bytes, pages, stage->order, n, op->nbytes, stage->stride, op->nbytes);
    if (stage->pieces == 1) return at_own_copy_pages(stage->bytes, stage->local, stage->order, pages, n, op->nbytes, op->nbytes, stage->stride);
    for (uint64_t step = stage->begin; step < stage->end; step++) { /* of large pages, few */
        uint64_t from = step % stage->pieces * op->piece, left = op->nbytes - from, k = left < op->piece ? left : op->piece;
        uint8_t *memory = stage->local + (uint64_t)stage->pages[step / stage->pieces] * stage->stride + from;
        uint8_t *copied = stage->bytes + place(stage, op, step) - first;
        int error = to_memory ? at_own_copy(memory, copied, k) : at_own_copy(copied, memory, k);
        if (error != 0) return error;
    }
    return 0;
}

int at_stage_copy(const at_op *op) {
    at_stage *stage = op->stage;
    if (stage->reads && stage->end != 0 && exchange(stage, op, 1) != 0) return AT_EMEMORY;
    if (stage->end == stage->steps || atomic_load(&op->withdrawn)) return AT_OK;
    stage->begin = stage->end;
    stage->end = stage->steps - stage->begin < stage->most ? stage->steps : stage->begin + stage->most;
    stage->more = stage->reads || stage->end != stage->steps;
    return stage->reads || exchange(stage, op, 0) == 0 ? AT_OK : AT_EMEMORY;
}

void at_stage_show(at_op *op) {
    const at_stage *stage = op->stage;
    op->local = (uint8_t *)((uintptr_t)stage->bytes - (uintptr_t)place(stage, op, stage->begin));
    if (stage->order != NULL) {
        op->local_pages = stage->order;
        op->local_stride = op->nbytes;
    }
    op->extent = stage->steps + (stage->reads ? 1 : stage->tail);
    op->tail = op->extent - stage->end;
}

int at_stage_new(at_op *op) {
    op->stage = made(op);
    if (op->stage == NULL) return AT_ENOMEM;
    op->peer->staged += op->stage->room;
    return AT_OK;
}

int at_stage_is_over(const at_op *op) { return op->moved == op->stage->steps; }

int at_stage_may(const at_op *op) {
    return op->stage != NULL || !op->region->slow || op->peer->pins || op->peer->staged < AT_STAGED_BYTES;
}

void at_stage_free(at_stage *stage) {
    if (stage != NULL) free(stage->order);
    free(stage);
}

void at_stage_drop(at_op *op) {
    at_stage *stage = op->stage;
    if (stage == NULL) return;
    op->stage = NULL;
    op->local = stage->local;
    op->local_pages = stage->pages;
    op->local_stride = stage->stride;
    op->peer->staged -= stage->room;
    at_stage_free(stage);
}

int at_stage_landed(at_op *op) {
    if (op->stage == NULL || !op->stage->more) return 0;
    op->risk = AT_RISK_SLOW;
    op->waits = 1;
    return 1;
}
