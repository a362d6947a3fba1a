/* The sums and conversions by AVX2 and by AVX-512, see tile.h and convert.h. Between floats as in numbers.h, bit by bit: bfloat16 by
 * integers (the processor's own instruction makes subnormal numbers zero), float16 by the processor's. */
#include "rows/numbers.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw")))
#define V __m512
#define LANES 16u
#define TILE 8u
#define ZERO _mm512_setzero_ps()
#define SPLAT _mm512_set1_ps
#define ADD _mm512_add_ps
#define MUL _mm512_mul_ps
#define CANON(a) _mm512_mask_mov_ps(a, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_ps(__builtin_nanf("")))
#define LOAD_F32(at) _mm512_loadu_ps(at)
#define LOAD_BF16(at) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(at))), 16))
#define LOAD_F16(at) _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(at)))
#define STORE_F32(at, a) _mm512_storeu_ps(at, a)
#define STORE_BF16(at, a) _mm256_storeu_si256((void *)(at), narrow_avx512(_mm512_castps_si512(a)))
/* All lanes by mask: gcc's macro for all lanes passes -1 for unsigned at -O0, which -Wconversion is told of. */
#define STORE_F16(at, a) \
    _mm256_storeu_si256((void *)(at), _mm512_maskz_cvtps_ph(0xFFFF, a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))

#define RAW __m512i
#define LOAD_RAW(at) _mm512_loadu_si512(at)
#define EVEN(r) _mm512_castsi512_ps(_mm512_slli_epi32(r, 16))
#define ODD(r) _mm512_castsi512_ps(_mm512_and_si512(r, _mm512_set1_epi32((int)0xFFFF0000)))
#define STORE_RAW(at, even, odd) \
    _mm512_storeu_si512(at, _mm512_or_si512(_mm512_srli_epi32(rounded_avx512(_mm512_castps_si512(even)), 16), \
                                            _mm512_and_si512(rounded_avx512(_mm512_castps_si512(odd)), _mm512_set1_epi32((int)0xFFFF0000))))
#define FIRST(even, odd) _mm512_permutex2var_ps(even, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), odd)
#define SECOND(even, odd) \
    _mm512_permutex2var_ps(even, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), odd)

#define DIV _mm512_div_ps
#define MIN _mm512_min_ps
#define MAX _mm512_max_ps
#define AS_V _mm512_castsi512_ps
#define AS_I _mm512_castps_si512
#define SPLAT_I _mm512_set1_epi32
#define AND _mm512_and_si512
#define OR _mm512_or_si512
#define PLUS _mm512_add_epi32
#define MINUS _mm512_sub_epi32
#define UP _mm512_slli_epi32
#define DOWN _mm512_srli_epi32
#define MOST32 _mm512_max_epu32
#define MOST16 _mm512_max_epu16
#define STORE_HALF(at, i) _mm256_storeu_si256((void *)(at), _mm512_cvtepi32_epi16(i))
#define STORE_QUARTER(at, i) _mm_storeu_si128((void *)(at), _mm512_cvtepi32_epi8(i))

/* To nearest, ties to even: what counts are the upper 16 bits. */
TARGET static inline __m512i rounded_avx512(__m512i bits) {
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
}

TARGET static inline __m256i narrow_avx512(__m512i bits) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_avx512(bits), 16));
}

#include "rows/tile.h"
#include "rows/convert.h"

#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,f16c")))
#define V __m256
#define LANES 8u
#define TILE 8u
#define ZERO _mm256_setzero_ps()
#define SPLAT _mm256_set1_ps
#define ADD _mm256_add_ps
#define MUL _mm256_mul_ps
#define CANON(a) _mm256_blendv_ps(a, _mm256_set1_ps(__builtin_nanf("")), _mm256_cmp_ps(a, a, _CMP_UNORD_Q))
#define LOAD_F32(at) _mm256_loadu_ps((const void *)(at))
#define LOAD_BF16(at) _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)(at))), 16))
#define LOAD_F16(at) _mm256_cvtph_ps(_mm_loadu_si128((const void *)(at)))
#define STORE_F32(at, a) _mm256_storeu_ps((void *)(at), a)
#define STORE_BF16(at, a) _mm_storeu_si128((void *)(at), narrow_avx2(_mm256_castps_si256(a)))
#define STORE_F16(at, a) _mm_storeu_si128((void *)(at), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))

#define RAW __m256i
#define LOAD_RAW(at) _mm256_loadu_si256((const void *)(at))
#define EVEN(r) _mm256_castsi256_ps(_mm256_slli_epi32(r, 16))
#define ODD(r) _mm256_castsi256_ps(_mm256_and_si256(r, _mm256_set1_epi32((int)0xFFFF0000)))
#define STORE_RAW(at, even, odd) \
    _mm256_storeu_si256((void *)(at), _mm256_blend_epi16(_mm256_srli_epi32(rounded_avx2(_mm256_castps_si256(even)), 16), \
                                                         rounded_avx2(_mm256_castps_si256(odd)), 0xAA))
#define FIRST(even, odd) _mm256_permute2f128_ps(_mm256_unpacklo_ps(even, odd), _mm256_unpackhi_ps(even, odd), 0x20)
#define SECOND(even, odd) _mm256_permute2f128_ps(_mm256_unpacklo_ps(even, odd), _mm256_unpackhi_ps(even, odd), 0x31)

#define DIV _mm256_div_ps
#define MIN _mm256_min_ps
#define MAX _mm256_max_ps
#define AS_V _mm256_castsi256_ps
#define AS_I _mm256_castps_si256
#define SPLAT_I _mm256_set1_epi32
#define AND _mm256_and_si256
#define OR _mm256_or_si256
#define PLUS _mm256_add_epi32
#define MINUS _mm256_sub_epi32
#define UP _mm256_slli_epi32
#define DOWN _mm256_srli_epi32
#define MOST32 _mm256_max_epu32
#define MOST16 _mm256_max_epu16
#define STORE_HALF(at, i) \
    _mm_storeu_si128((void *)(at), _mm_packus_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1)))
#define STORE_QUARTER(at, i) \
    _mm_storel_epi64((void *)(at), _mm_packus_epi16(_mm_packus_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1)), \
                                                    _mm_setzero_si128()))

TARGET static inline __m256i rounded_avx2(__m256i bits) {
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
}

TARGET static inline __m128i narrow_avx2(__m256i bits) {
    __m256i up = _mm256_srli_epi32(rounded_avx2(bits), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1));
}

#include "rows/tile.h"
#include "rows/convert.h"

#endif
