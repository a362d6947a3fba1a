/* The shelves of immediate values against an array that says what is there, with hashes good and bad. Includes values.c. */
#include "lane/values.c"

#include <stdio.h>

#define RANGE 60000u

static int32_t expected[RANGE]; /* 0: not there, else the value + 1 */
static uint64_t state = 12345;

uint64_t at_now(void) { return 1; }
void at_lock(at_lane *lane) { (void)lane; }
void at_unlock(at_lane *lane) { (void)lane; }

static uint32_t draw(uint32_t n) { /* splitmix64 */
    uint64_t z = (state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return (uint32_t)((z ^ (z >> 31)) % n);
}

static uint32_t value_of(uint32_t i, uint32_t stride) { return i * stride; }

static uint32_t differences(const at_imm_values *values, uint32_t range, uint32_t stride) {
    uint32_t wrong = 0;
    for (uint32_t i = 0; i < range; i++) {
        int32_t found = at_values_find(values, value_of(i, stride))->value;
        wrong += found != (expected[i] == 0 ? AT_IMM_EMPTY : expected[i] - 1);
    }
    return wrong;
}

static uint32_t run(uint64_t multiplier, uint32_t range, uint32_t stride, uint32_t steps) {
    at_imm_values values = {.count = 0};
    if (at_values_open(&values) != AT_OK) return 1;
    if (multiplier != 0) values.multiplier = multiplier;
    for (uint32_t i = 0; i < range; i++) expected[i] = 0;
    uint32_t wrong = 0;
    for (uint32_t step = 0; step < steps; step++) {
        uint32_t i = draw(range), removes = draw(4) == 0;
        if (removes) {
            at_values_remove(&values, value_of(i, stride));
            expected[i] = 0;
        } else {
            at_imm_entry *entry = at_values_entry(&values, value_of(i, stride));
            wrong += entry == NULL || (entry->value == AT_IMM_FRESH) != (expected[i] == 0);
            if (entry != NULL) entry->value = (int32_t)i;
            expected[i] = (int32_t)i + 1;
        }
    }
    wrong += differences(&values, range, stride);
    wrong += multiplier == 0 && values.moved > AT_IMM_SHELF;
    at_values_close(&values);
    return wrong;
}

int main(void) {
    uint32_t wrong = run(0, RANGE, 1, 400000);
    wrong += run(0, RANGE, 65536, 400000);
    wrong += run(0, 300, 1, 20000);
    wrong += run(1, 6000, 1, 40000); /* every value has the same hash */
    printf("%u wrong\n", wrong);
    return wrong != 0;
}
