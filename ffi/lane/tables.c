/* Memory for the index tables of a call. The lane keeps that of one call for the next: allocating it anew costs page faults. */
#include "tables.h"

#include <stdlib.h>

#include "lane.h"

#define LEAST_PAGES ((uint64_t)256)
#define MOST_SPARE_PAGES ((uint64_t)1 << 17) /* tables of more are not kept for the next call: 1 MiB */

int at_tables_take(at_lane *lane, uint64_t n, at_tables *tables) {
    *tables = lane->tables;
    lane->tables = (at_tables){NULL, 0};
    if (n > SIZE_MAX / 2 / sizeof *tables->pages) return AT_ENOMEM;
    if (tables->pages == NULL || tables->room < 2 * n) {
        free(tables->pages);
        tables->room = n < LEAST_PAGES ? 2 * LEAST_PAGES : 2 * n;
        tables->pages = malloc((size_t)tables->room * sizeof *tables->pages);
    }
    return tables->pages != NULL ? AT_OK : AT_ENOMEM;
}

void at_tables_give(at_lane *lane, at_tables *tables) {
    at_tables last = lane->tables; /* that of another thread, which was over before */
    int kept = tables->pages != NULL && tables->room <= MOST_SPARE_PAGES && (last.pages == NULL || tables->room > last.room);
    if (kept) lane->tables = *tables;
    free(kept ? last.pages : tables->pages);
}
