/* Slots: what a completion names. Taken and given back, never freed before the rail: a late completion finds memory that is ours. */

#include "fabric.h"

#include <stdlib.h>

#define BLOCK AT_FAB_BLOCK

static int add_block(at_fab *fab) {
    if (fab->block_count == fab->block_room) {
        uint32_t room = fab->block_room ? fab->block_room * 2 : 8;
        at_fab_slot **blocks = realloc(fab->blocks, room * sizeof *blocks);
        if (blocks != NULL) fab->blocks = blocks;
        void **mrs = realloc(fab->block_mrs, room * sizeof *mrs);
        if (mrs != NULL) fab->block_mrs = mrs;
        if (blocks == NULL || mrs == NULL) return -1;
        fab->block_room = room;
    }
    at_fab_slot *block = calloc(BLOCK, sizeof *block);
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

at_fab_slot *at_fab_slot_take(at_fab *fab) {
    if (fab->free == NULL && add_block(fab) != 0) return NULL;
    at_fab_slot *slot = fab->free;
    fab->free = slot->next;
    slot->next = slot->previous = NULL;
    return slot;
}

void at_fab_slot_free(at_fab *fab, at_fab_slot *slot) {
    slot->state = AT_SLOT_FREE;
    if (slot->bounce != NULL) at_fab_bounce_free(fab, slot);
    slot->end = NULL;
    slot->op = NULL;
    slot->next = fab->free;
    fab->free = slot;
}

void at_fab_slot_retire(at_fab *fab, at_fab_slot *slot) {
    slot->end = NULL;
    slot->op = NULL;
    slot->state = fab->shared != NULL ? AT_SLOT_ORPHAN : AT_SLOT_LIMBO;
    if (fab->shared != NULL) return;
    if (slot->bounce != NULL) at_fab_bounce_free(fab, slot); /* its endpoint is closed */
    slot->next = fab->limbo;
    fab->limbo = slot;
}

void at_fab_list_add(at_fab_list *list, at_fab_slot *slot) {
    slot->next = NULL;
    slot->previous = list->tail;
    if (list->tail != NULL) list->tail->next = slot;
    else list->head = slot;
    list->tail = slot;
}

void at_fab_list_remove(at_fab_list *list, at_fab_slot *slot) {
    if (slot->previous != NULL) slot->previous->next = slot->next;
    else list->head = slot->next;
    if (slot->next != NULL) slot->next->previous = slot->previous;
    else list->tail = slot->previous;
    slot->next = slot->previous = NULL;
}

void at_fab_slots_close(at_fab *fab) {
    for (uint32_t i = 0; i < fab->block_count; i++) {
        if (fab->block_mrs[i] != NULL) fab->driver->dismiss(fab, fab->block_mrs[i]);
        for (uint32_t k = 0; k < BLOCK; k++) at_fab_bounce_free(fab, &fab->blocks[i][k]);
        free(fab->blocks[i]);
    }
    while (fab->bounce_count != 0) free(fab->bounces[--fab->bounce_count]);
    free(fab->blocks);
    free(fab->block_mrs);
}
