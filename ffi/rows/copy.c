/* Copying, by size.
 *
 * What fits the cache is copied by the C library. What does not gains from streaming (non-temporal) stores: they do not read the
 * destination's lines first and do not push the source out of the cache. The C library has such a path, but its threshold follows
 * the cache sizes that a virtual machine reports, which are often wrong; measured between two touched memfd mappings on an EPYC
 * guest, streaming stores give 1.6-2 times the C library from 4 MiB up and 1.2-2.4 times on random cold pages.
 *
 * Streaming stores are weakly ordered: each routine ends with a store fence, so that a thread that is told afterwards sees the bytes. */
#include "rows/copy.h"

#include <pthread.h>
#include <string.h>

#define COLD_BYTES ((uint64_t)3 << 20) /* operations from this size on do not fit beside their source in a 1-MiB L2 */
#define SMALL 512u                     /* below this a streaming copy cannot win */

int at_copy_prefers_cold(uint64_t total) { return total >= COLD_BYTES; }

#if defined(__x86_64__)
#include <immintrin.h>

typedef void (*stream_fn)(uint8_t *, const uint8_t *, size_t);

/* dst is aligned to the vector; n is a multiple of four vectors. */
__attribute__((target("avx512f"))) static void stream_avx512(uint8_t *dst, const uint8_t *src, size_t n) {
    for (size_t i = 0; i < n; i += 256) {
        __m512i a = _mm512_loadu_si512(src + i), b = _mm512_loadu_si512(src + i + 64);
        __m512i c = _mm512_loadu_si512(src + i + 128), d = _mm512_loadu_si512(src + i + 192);
        _mm_prefetch((const char *)(src + i + 1024), _MM_HINT_NTA);
        _mm_prefetch((const char *)(src + i + 1088), _MM_HINT_NTA);
        _mm_prefetch((const char *)(src + i + 1152), _MM_HINT_NTA);
        _mm_prefetch((const char *)(src + i + 1216), _MM_HINT_NTA);
        _mm512_stream_si512((void *)(dst + i), a);
        _mm512_stream_si512((void *)(dst + i + 64), b);
        _mm512_stream_si512((void *)(dst + i + 128), c);
        _mm512_stream_si512((void *)(dst + i + 192), d);
    }
}

__attribute__((target("avx"))) static void stream_avx(uint8_t *dst, const uint8_t *src, size_t n) {
    for (size_t i = 0; i < n; i += 128) {
        __m256i a = _mm256_loadu_si256((const void *)(src + i)), b = _mm256_loadu_si256((const void *)(src + i + 32));
        __m256i c = _mm256_loadu_si256((const void *)(src + i + 64)), d = _mm256_loadu_si256((const void *)(src + i + 96));
        _mm_prefetch((const char *)(src + i + 1024), _MM_HINT_NTA);
        _mm_prefetch((const char *)(src + i + 1088), _MM_HINT_NTA);
        _mm256_stream_si256((void *)(dst + i), a);
        _mm256_stream_si256((void *)(dst + i + 32), b);
        _mm256_stream_si256((void *)(dst + i + 64), c);
        _mm256_stream_si256((void *)(dst + i + 96), d);
    }
}

static void stream_sse2(uint8_t *dst, const uint8_t *src, size_t n) {
    for (size_t i = 0; i < n; i += 64) {
        __m128i a = _mm_loadu_si128((const void *)(src + i)), b = _mm_loadu_si128((const void *)(src + i + 16));
        __m128i c = _mm_loadu_si128((const void *)(src + i + 32)), d = _mm_loadu_si128((const void *)(src + i + 48));
        _mm_stream_si128((void *)(dst + i), a);
        _mm_stream_si128((void *)(dst + i + 16), b);
        _mm_stream_si128((void *)(dst + i + 32), c);
        _mm_stream_si128((void *)(dst + i + 48), d);
    }
}

static stream_fn stream;
static size_t vector, block;
static const char *name;
static pthread_once_t chosen = PTHREAD_ONCE_INIT;

static void choose(void) {
    if (__builtin_cpu_supports("avx512f")) stream = stream_avx512, vector = 64, block = 256, name = "avx512";
    else if (__builtin_cpu_supports("avx")) stream = stream_avx, vector = 32, block = 128, name = "avx";
    else stream = stream_sse2, vector = 16, block = 64, name = "sse2";
}

const char *at_copy_name(void) {
    (void)pthread_once(&chosen, choose);
    return name;
}

static void stream_copy(uint8_t *dst, const uint8_t *src, size_t n) {
    if (n < SMALL) {
        memcpy(dst, src, n);
        return;
    }
    size_t head = (vector - ((uintptr_t)dst & (vector - 1))) & (vector - 1);
    if (head != 0) memcpy(dst, src, head);
    size_t body = (n - head) / block * block;
    stream(dst + head, src + head, body);
    size_t tail = n - head - body;
    if (tail != 0) memcpy(dst + head + body, src + head + body, tail);
}

void at_copy_part(void *dst, const void *src, size_t n) {
    (void)pthread_once(&chosen, choose);
    stream_copy(dst, src, n);
}

void at_copy_end(void) { _mm_sfence(); }

void at_copy_ahead(const void *at, size_t n) {
    for (size_t i = 0; i < n && i < 512; i += 64) _mm_prefetch((const char *)at + i, _MM_HINT_NTA);
}

#else

const char *at_copy_name(void) { return "memcpy"; }
void at_copy_part(void *dst, const void *src, size_t n) { memcpy(dst, src, n); }
void at_copy_end(void) {}
void at_copy_ahead(const void *at, size_t n) { (void)at, (void)n; }

#endif

void at_copy_cold(void *dst, const void *src, size_t n) {
    at_copy_part(dst, src, n);
    at_copy_end();
}

void at_copy(void *dst, const void *src, size_t n) {
    if (at_copy_prefers_cold(n)) at_copy_cold(dst, src, n);
    else memcpy(dst, src, n);
}

void at_copy_pages(uint8_t *dst, const uint8_t *src, const int64_t *dst_idx, const int64_t *src_idx, size_t n, size_t page,
                   size_t dst_stride, size_t src_stride, int cold) {
    if (!cold) {
        for (size_t i = 0; i < n; i++)
            memcpy(dst + (size_t)dst_idx[i] * dst_stride, src + (size_t)src_idx[i] * src_stride, page);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        if (i + 1 < n) at_copy_ahead(src + (size_t)src_idx[i + 1] * src_stride, page);
        at_copy_part(dst + (size_t)dst_idx[i] * dst_stride, src + (size_t)src_idx[i] * src_stride, page);
    }
    at_copy_end();
}
