/* Slots: what a completion names. Taken and given back, never freed before the rail: a late completion finds memory that is ours. */

#include "fabric.h"

#include <stdlib.h>

#define BLOCK AT_FAB_BLOCK

static int add_block(at_fab *fab) {
    if (fab->block_count == fab->block_room) {
        uint32_t room = fab->block_room ? fab->block_room * 2 : 8;
        at_fab_wr **blocks = realloc(fab->blocks, room * sizeof *blocks);
        if (blocks != NULL) fab->blocks = blocks;
        void **mrs = realloc(fab->block_mrs, room * sizeof *mrs);
        if (mrs != NULL) fab->block_mrs = mrs;
        if (blocks == NULL || mrs == NULL) return -1;
        fab->block_room = room;
    }
    at_fab_wr *block = calloc(BLOCK, sizeof *block);
    if (block == NULL) return -1;
    at_fab_mr mr = {0};
    if (at_fab_is(fab, AT_FAB_LOCAL_MR) && at_fab_register_host(fab, block, BLOCK * sizeof *block, AT_USE_CTRL, &mr) != AT_OK) {
        free(block);
        return -1;
    }
    fab->blocks[fab->block_count] = block;
    fab->block_mrs[fab->block_count++] = mr.mr;
    for (uint32_t i = 0; i < BLOCK; i++) {
        block[i].desc = mr.mr != NULL ? fab->driver->desc(mr.mr) : NULL;
        block[i].next = fab->free;
        fab->free = &block[i];
    }
    return 0;
}

at_fab_wr *at_fab_wr_take(at_fab *fab) {
    if (fab->free == NULL && add_block(fab) != 0) return NULL;
    at_fab_wr *wr = fab->free;
    fab->free = wr->next;
    wr->next = wr->previous = NULL;
    return wr;
}

void at_fab_wr_free(at_fab *fab, at_fab_wr *wr) {
    wr->state = AT_WR_FREE;
    if (wr->bounce != NULL) at_fab_bounce_free(fab, wr);
    wr->conn = NULL;
    wr->op = NULL;
    wr->next = fab->free;
    fab->free = wr;
}

void at_fab_wr_retire(at_fab *fab, at_fab_wr *wr) {
    wr->conn = NULL;
    wr->op = NULL;
    wr->state = fab->shared != NULL ? AT_WR_ORPHAN : AT_WR_LIMBO;
    if (fab->shared != NULL) return;
    if (wr->bounce != NULL) at_fab_bounce_free(fab, wr); /* its endpoint is closed */
    wr->next = fab->limbo;
    fab->limbo = wr;
}

void at_fab_list_add(at_fab_list *list, at_fab_wr *wr) {
    wr->next = NULL;
    wr->previous = list->tail;
    if (list->tail != NULL) list->tail->next = wr;
    else list->head = wr;
    list->tail = wr;
}

void at_fab_list_remove(at_fab_list *list, at_fab_wr *wr) {
    if (wr->previous != NULL) wr->previous->next = wr->next;
    else list->head = wr->next;
    if (wr->next != NULL) wr->next->previous = wr->previous;
    else list->tail = wr->previous;
    wr->next = wr->previous = NULL;
}

void at_fab_wrs_close(at_fab *fab) {
    for (uint32_t i = 0; i < fab->block_count; i++) {
        if (fab->block_mrs[i] != NULL) fab->driver->dismiss(fab, fab->block_mrs[i]);
        for (uint32_t k = 0; k < BLOCK; k++) at_fab_bounce_free(fab, &fab->blocks[i][k]);
        free(fab->blocks[i]);
    }
    while (fab->bounce_count != 0) free(fab->bounces[--fab->bounce_count]);
    free(fab->blocks);
    free(fab->block_mrs);
}
