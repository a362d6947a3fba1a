/* Copy routines chosen by size, see copy.c. */
#ifndef AT_COPY_H
#define AT_COPY_H

#include <stddef.h>
#include <stdint.h>

/* One contiguous copy; the routine is chosen by n. */
void at_copy(void *dst, const void *src, size_t n);
/* One contiguous copy by streaming stores, for any n. */
void at_copy_cold(void *dst, const void *src, size_t n);
/* The same in parts: what the parts wrote is in order for others only after at_copy_end. at_copy_ahead: this is read next. */
void at_copy_part(void *dst, const void *src, size_t n);
void at_copy_ahead(const void *at, size_t n);
void at_copy_end(void);
/* n pages: dst + dst_idx[i] * dst_stride <- src + src_idx[i] * src_stride. */
void at_copy_pages(uint8_t *dst, const uint8_t *src, const int64_t *dst_idx, const int64_t *src_idx, size_t n, size_t page,
                   size_t dst_stride, size_t src_stride, int cold);
/* Whether an operation of this many bytes in all is better served by streaming stores. */
int at_copy_prefers_cold(uint64_t total);
const char *at_copy_name(void);

#endif
