/* Limits for the benchmark: the same access patterns as plain copies, timed in C. */

/* Seconds for `repeats` copies of n bytes from src + i * src_step to dst + i * dst_step; cold != 0: streaming stores. */
double at_bench_copy(void *dst, const void *src, uint64_t n, uint64_t repeats, uint64_t step, uint64_t wrap, int cold);
/* Seconds for one pass over a page table. */
double at_bench_pages(void *dst, const void *src, const int64_t *dst_idx, const int64_t *src_idx, uint64_t n, uint64_t page,
                      int cold);
/* Seconds for `repeats` writes of n bytes each to address va of a process: process_vm_writev, or pwrite to mem_fd when it is >= 0.
 * With page != 0: n pages from src_idx to dst_idx instead. Negative when the kernel refused. */
double at_bench_foreign(int pid, int mem_fd, uint64_t va, const void *src, uint64_t n, uint64_t repeats, const int64_t *dst_idx,
                        const int64_t *src_idx, uint64_t page);
/* Tests: one copy by the routine `mode` (0: chosen by size, 1: streaming). */
void at_bench_once(void *dst, const void *src, uint64_t n, int mode);
/* Which streaming routine this machine gets. */
const char *at_copy_name(void);
