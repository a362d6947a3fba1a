/* A CUDA driver without a GPU, as far as this library asks one.
 *
 * A few addresses are device memory: nothing may be read or written there by the host, which crashes if it tries. Behind the ranges
 * called "real" there is memory elsewhere, by which copies work; fake_cuda_backing tells a test where. FAKE_CUDA_FAIL names a call that
 * is refused with CUDA_ERROR_UNKNOWN. fake_cuda_calls counts the others by name; fake_cuda_slow_us makes every copy take so long.
 * fake_cuda_launch is a kernel that adds to bytes: it is done when the context is waited for, and no copy waits for it. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MEMORY_TYPE = 2, SYNC_MEMOPS = 6, IS_MANAGED = 8, DEVICE_ORDINAL = 9, RANGE_START = 11, RANGE_SIZE = 12 };

/* Two mappings in a row on device 1 (expandable segments), one on device 0 right behind them, a managed one, and a real one. */
static const struct {
    uint64_t start, size;
    unsigned managed;
    int ordinal;
} ranges[] = {
    {0x500000000000, 0x10000, 0, 1}, {0x500000010000, 0x10000, 0, 1}, {0x500000020000, 0x10000, 0, 0}, {0x600000000000, 0x10000, 1, 0},
    {0x510000000000, 0x400000, 0, 1},
};
#define REAL ranges[4]

static __thread int contexts; /* pushed on this thread */
static int backing_fd = -1;
static uint8_t *backing;
volatile uint32_t fake_cuda_slow_us;
static struct {
    char name[40];
    uint32_t count;
} calls[48];

static int called(const char *call) {
    const char *fail = getenv("FAKE_CUDA_FAIL");
    if (fail != NULL && strcmp(fail, call) == 0) return 999;
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        if (calls[i].name[0] == 0) (void)strncpy(calls[i].name, call, sizeof calls[i].name - 1);
        if (strcmp(calls[i].name, call) != 0) continue;
        __atomic_add_fetch(&calls[i].count, 1, __ATOMIC_SEQ_CST);
        break;
    }
    return 0;
}

uint32_t fake_cuda_calls(const char *call) {
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
        if (strcmp(calls[i].name, call) == 0) return __atomic_load_n(&calls[i].count, __ATOMIC_SEQ_CST);
    return 0;
}

/* Where the memory behind a real device address is; NULL: there is none. */
void *fake_cuda_backing(uint64_t device) {
    if (device - REAL.start >= REAL.size) return NULL;
    if (backing == NULL) {
        backing_fd = memfd_create("fake device memory", MFD_CLOEXEC);
        if (backing_fd < 0 || ftruncate(backing_fd, (off_t)REAL.size) != 0) return NULL;
        backing = mmap(NULL, REAL.size, PROT_READ | PROT_WRITE, MAP_SHARED, backing_fd, 0);
    }
    return backing + (device - REAL.start);
}

int cuInit(unsigned flags) { return flags != 0 ? 1 : called("cuInit"); }

int cuGetErrorName(int code, const char **name) {
    *name = code == 999 ? "CUDA_ERROR_UNKNOWN" : "CUDA_ERROR_INVALID_VALUE";
    return 0;
}

int cuPointerGetAttribute(void *out, int attribute, uint64_t pointer) {
    if (called("cuPointerGetAttribute")) return 999;
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

int cuPointerSetAttribute(const void *value, int attribute, uint64_t pointer) {
    if (called("cuPointerSetAttribute")) return 999;
    return attribute == SYNC_MEMOPS && *(const unsigned *)value == 1 && pointer - REAL.start < REAL.size ? 0 : 1;
}

/* ---- devices and contexts ---- */

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal + 100; /* a handle, not the ordinal */
    return called("cuDeviceGet");
}

int cuDeviceGetPCIBusId(char *text, int size, int device) {
    if (device < 100) return 101;
    (void)snprintf(text, (size_t)size, "0000:%02X:00.0", (unsigned)(device - 100 + 0x81)); /* as the real one: capitals */
    return called("cuDeviceGetPCIBusId");
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 117 ? 1 : 0; /* the host can flush, and has to */
    return device < 100 ? 101 : called("cuDeviceGetAttribute");
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    if (device < 100) return 101;
    *context = (void *)(uintptr_t)device;
    return called("cuDevicePrimaryCtxRetain");
}

int cuCtxPushCurrent_v2(void *context) {
    if (context == NULL) return 201;
    if (called("cuCtxPushCurrent")) return 999;
    contexts++;
    return 0;
}

int cuCtxPopCurrent_v2(void **context) {
    if (contexts == 0) return 201;
    *context = NULL;
    contexts--;
    return called("cuCtxPopCurrent");
}

/* ---- kernels: what was launched is done when the context is waited for ---- */

static struct {
    uint8_t *at;
    size_t n;
    uint8_t add;
} launched[64];
static uint32_t launches;

int fake_cuda_launch(uint64_t device, size_t n, unsigned add) {
    uint8_t *at = fake_cuda_backing(device);
    if (at == NULL || launches == sizeof launched / sizeof *launched) return 1;
    launched[launches].at = at;
    launched[launches].n = n;
    launched[launches++].add = (uint8_t)add;
    return 0;
}

int cuCtxSynchronize(void) {
    if (contexts == 0) return 201;
    if (called("cuCtxSynchronize")) return 999;
    for (uint32_t k = 0; k < launches; k++)
        for (size_t i = 0; i < launched[k].n; i++) launched[k].at[i] = (uint8_t)(launched[k].at[i] + launched[k].add);
    launches = 0;
    return 0;
}

/* ---- memory: handed out from the end; tests take theirs from the beginning ---- */

static uint64_t handed;
static uint32_t holders;

int cuMemAlloc_v2(uint64_t *address, size_t n) {
    uint64_t aligned = (n + 255) / 256 * 256;
    if (contexts == 0 || n == 0) return 1;
    if (called("cuMemAlloc")) return 999;
    if (handed + aligned > REAL.size / 2) return 2;
    handed += aligned;
    holders++;
    *address = REAL.start + REAL.size - handed;
    return 0;
}

int cuMemFree_v2(uint64_t address) {
    if (contexts == 0 || fake_cuda_backing(address) == NULL || holders == 0) return 1;
    if (--holders == 0) handed = 0;
    return called("cuMemFree");
}

/* ---- copies: they need a context, and a stream that is alive; what is copied is there only after the stream has been waited for ---- */

typedef struct {
    uint8_t *to;
    const uint8_t *from;
    size_t n;
} move;
typedef struct {
    move moves[4096];
    size_t count;
} stream;

int cuStreamCreate(void **out, unsigned flags) {
    if (contexts == 0 || flags != 1) return 201;
    if (called("cuStreamCreate")) return 999;
    return (*out = calloc(1, sizeof(stream))) == NULL ? 2 : 0;
}

static int enqueue(stream *s, uint8_t *to, const uint8_t *from, size_t n) {
    if (contexts == 0 || to == NULL || from == NULL || s->count == sizeof s->moves / sizeof *s->moves) return 1;
    s->moves[s->count++] = (move){to, from, n};
    return 0;
}

int cuMemcpyDtoHAsync_v2(void *host, uint64_t device, size_t n, void *s) {
    if (called("cuMemcpyDtoHAsync")) return 999;
    return enqueue(s, host, fake_cuda_backing(device), n);
}

int cuMemcpyHtoDAsync_v2(uint64_t device, const void *host, size_t n, void *s) {
    if (called("cuMemcpyHtoDAsync")) return 999;
    return enqueue(s, fake_cuda_backing(device), host, n);
}

int cuStreamSynchronize(void *one) {
    stream *s = one;
    if (fake_cuda_slow_us != 0) (void)usleep(fake_cuda_slow_us);
    for (size_t i = 0; i < s->count; i++) memcpy(s->moves[i].to, s->moves[i].from, s->moves[i].n);
    s->count = 0;
    return called("cuStreamSynchronize");
}

int cuStreamDestroy_v2(void *one) {
    free(one);
    return called("cuStreamDestroy");
}

/* ---- memory that is pinned, and dma-bufs ---- */

int cuMemHostRegister_v2(void *host, size_t n, unsigned flags) {
    return contexts == 0 || host == NULL || n == 0 || flags != 0 ? 1 : called("cuMemHostRegister");
}

int cuMemHostUnregister(void *host) { return contexts == 0 || host == NULL ? 1 : called("cuMemHostUnregister"); }

int cuMemGetHandleForAddressRange(int *fd, uint64_t device, size_t n, int kind, unsigned long long flags) {
    if (called("cuMemGetHandleForAddressRange")) return 999;
    if (kind != 1 || flags != 0 || device % 4096 != 0 || n % 4096 != 0 || fake_cuda_backing(device) == NULL) return 1;
    *fd = dup(backing_fd);
    return *fd < 0 ? 1 : 0;
}

int cuFlushGPUDirectRDMAWrites(int target, int scope) { return contexts == 0 || target != 0 || scope != 100 ? 1 : called("cuFlushGPUDirectRDMAWrites"); }
