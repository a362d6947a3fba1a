/* Rows of memory: moved from place to place, summed with weights, converted.
 *
 * Pure functions of their arguments; no lane is involved. All memory is lent until return. Nothing is checked: the caller has
 * proved that every row lies inside its memory (aiotransfer/providers/rows.py, numbers.py). Rows need no alignment. */

enum at_row_kind { AT_ROW_F32 = 0, AT_ROW_BF16 = 1, AT_ROW_F16 = 2, AT_ROW_F64 = 3 /* in casts only */ };

/* Row src_rows[i] of src (i where it is NULL) to row dst_rows[i] of dst, for i in 0..n-1; strides in bytes. The two must not overlap. */
void at_rows_move(uint8_t *dst, uint64_t dst_stride, const int64_t *dst_rows, const uint8_t *src, uint64_t src_stride,
                  const int64_t *src_rows, uint64_t n, uint64_t nbytes);
/* Row t of out = the sum over k of weights[t][k] * the row at address rows[t][k], hidden elements each; rows and weights are
 * [tokens][choices], and an address of 0 is left out. Summed in float32, in the order of k, each product rounded before it is
 * added: the bits are the same on every processor. A sum that is no number becomes the one quiet NaN. Out must not overlap any row. */
void at_rows_weigh(uint8_t *out, uint64_t out_stride, int out_kind, const uint64_t *rows, int kind, const float *weights,
                   uint64_t tokens, uint64_t choices, uint64_t hidden);
/* Matrices of rows x columns numbers, converted from one kind to another: to nearest, ties to even; what is too large becomes
 * infinity, and a NaN the one quiet NaN. Strides in bytes, from matrix to matrix, from row to row and, in src, from column to column:
 * where those are no neighbours it is done one number at a time. */
void at_rows_cast(uint8_t *dst, uint64_t dst_matrix, uint64_t dst_row, int dst_kind, const uint8_t *src, uint64_t src_matrix,
                  uint64_t src_row, uint64_t src_column, int src_kind, uint64_t matrices, uint64_t rows, uint64_t columns);
/* Matrices as float8_e4m3fn with one float32 scale for each block: the greatest magnitude / 448, or 1 where that is 0; numbers are
 * those of src / scale, to nearest, ties to even, at most 448. The last blocks of a matrix may be smaller. Returns -1, or where the
 * first number that is not finite lies, counted through all of src; dst and scales are then written in part. */
int64_t at_rows_quantise(uint8_t *dst, uint64_t dst_matrix, uint64_t dst_row, uint8_t *scales, uint64_t scales_matrix,
                         uint64_t scales_row, const uint8_t *src, uint64_t src_matrix, uint64_t src_row, uint64_t src_column,
                         int kind, uint64_t matrices, uint64_t rows, uint64_t columns, uint64_t block_rows, uint64_t block_columns);
/* Tests: use instructions up to `level` (0: plain C, 1: AVX2 and F16C, 2: AVX-512 with its BW) as far as the processor has them. Returns the
 * level in use. */
int at_rows_limit(int level);
