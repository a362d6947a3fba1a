/* A CUDA driver without a GPU, as far as registration asks one: a few addresses are device memory. Nothing is mapped at any of them, so
 * whoever touches one as if it were host memory crashes. FAKE_CUDA_FAIL names a call that is refused with CUDA_ERROR_UNKNOWN. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MEMORY_TYPE = 2, IS_MANAGED = 8, DEVICE_ORDINAL = 9, RANGE_START = 11, RANGE_SIZE = 12 };

/* Two mappings in a row on device 1 (expandable segments), one on device 0 right behind them, and a managed one. */
static const struct {
    uint64_t start, size;
    unsigned managed;
    int ordinal;
} ranges[] = {
    {0x500000000000, 0x10000, 0, 1}, {0x500000010000, 0x10000, 0, 1}, {0x500000020000, 0x10000, 0, 0}, {0x600000000000, 0x10000, 1, 0},
};

static int refused(const char *call) {
    const char *fail = getenv("FAKE_CUDA_FAIL");
    return fail != NULL && strcmp(fail, call) == 0 ? 999 : 0;
}

int cuInit(unsigned flags) { return flags != 0 ? 1 : refused("cuInit"); }

int cuGetErrorName(int code, const char **name) {
    *name = code == 999 ? "CUDA_ERROR_UNKNOWN" : "CUDA_ERROR_INVALID_VALUE";
    return 0;
}

int cuPointerGetAttribute(void *out, int attribute, uint64_t pointer) {
    if (refused("cuPointerGetAttribute")) return 999;
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
        if (pointer - ranges[i].start >= ranges[i].size) continue;
        if (attribute == MEMORY_TYPE) *(unsigned *)out = 2;
        else if (attribute == IS_MANAGED) *(unsigned *)out = ranges[i].managed;
        else if (attribute == DEVICE_ORDINAL) *(int *)out = ranges[i].ordinal;
        else if (attribute == RANGE_START) *(uint64_t *)out = ranges[i].start;
        else if (attribute == RANGE_SIZE) *(uint64_t *)out = ranges[i].size;
        else return 1;
        return 0;
    }
    return 1;
}
