/* The mode of float arithmetic: some programs let the processor take subnormal numbers for zero, which would make other results.
 *
 * What is computed between at_mode_strict and at_mode_restore lies in functions that are not inlined: the compiler moves arithmetic
 * across these two otherwise. */
#ifndef AT_MODE_H
#define AT_MODE_H

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
typedef unsigned int at_mode;
static inline at_mode at_mode_strict(void) {
    at_mode before = _mm_getcsr();
    _mm_setcsr(0x1F80); /* to nearest, subnormal numbers kept, no traps */
    return before;
}
static inline void at_mode_restore(at_mode before) { _mm_setcsr(before); }
#elif defined(__aarch64__)
typedef uint64_t at_mode;
static inline at_mode at_mode_strict(void) {
    at_mode before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0));
    return before;
}
static inline void at_mode_restore(at_mode before) { __asm__ volatile("msr fpcr, %0" : : "r"(before)); }
#else
typedef int at_mode;
static inline at_mode at_mode_strict(void) { return 0; }
static inline void at_mode_restore(at_mode before) { (void)before; }
#endif

#endif
