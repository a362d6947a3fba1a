/* What the simulated network takes for memory that was lent: every range inside a region and none beside it. Includes simrail.c, whose
 * functions are its own. */
#include "simrail/simrail.c"

#include <stdio.h>

int main(void) {
    static const uint64_t bases[] = {0x1000, 0, UINT64_MAX - 99};
    int wrong = 0, expected = 0;
    at_simrail net = {0};
    for (uint32_t b = 0; b < 3; b++) {
        memory region = {.key = UINT64_C(1) << 32 | 1, .address = bases[b], .nbytes = 100, .live = 1}, *all[] = {&region};
        rail one = {.cable = 0, .memories = all, .memory_count = 1};
        for (uint64_t offset = 0; offset < 400; offset++) {
            for (uint64_t nbytes = 1; nbytes < 202; nbytes += 20) {
                uint64_t from = offset - 150; /* also before it, and around the end of the address space */
                int inside = from < 100 && nbytes <= 100 - from;
                expected += !inside;
                wrong += is_lent(&net, &one, region.key, region.address + from, nbytes) != inside;
            }
        }
        expected += 3;
        wrong += is_lent(&net, &one, region.key + 1, region.address, 1);
        wrong += is_lent(&net, &one, region.key, region.address, UINT64_MAX);
        region.live = 0;
        wrong += is_lent(&net, &one, region.key, region.address, 1);
    }
    printf("%d wrong, %d violations of %d\n", wrong, net.violations, expected);
    return wrong != 0 || net.violations != expected;
}
