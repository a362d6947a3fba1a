/* Memory of ours whose pages may be taken away while it is registered, see own.c. */
#ifndef AT_OWN_H
#define AT_OWN_H

#include <stdint.h>

/* What the memory is: a mapping of a file that a process may shorten, and perhaps of a file system that takes its time. */
enum { AT_FILE_NONE, AT_FILE_MEMORY, AT_FILE_SLOW };
int at_own_kind(const void *base, uint64_t nbytes);

/* Copy n bytes within this process; 0, or EFAULT when a page of either is gone. A signal is never raised. */
int at_own_copy(void *to, const void *from, uint64_t n);
/* The same of n pages at indexes, as at_copy_pages takes them. */
int at_own_copy_pages(uint8_t *to, const uint8_t *from, const int64_t *to_pages, const int64_t *from_pages, uint64_t n, uint64_t page,
                      uint64_t to_stride, uint64_t from_stride);
/* Whether all of it can be read: it reads a byte of each page. */
int at_own_readable(const void *base, uint64_t n);

#endif
