/* Rows of token memory: moved from place to place, and summed with weights.
 *
 * Pure functions of their arguments; no lane is involved. All memory is lent until return. Nothing is checked: the caller has
 * proved that every row lies inside its memory (aiotransfer/providers/rows.py). Rows need no alignment. */

enum at_row_kind { AT_ROW_F32 = 0, AT_ROW_BF16 = 1, AT_ROW_F16 = 2 };

/* Row src_rows[i] of src (i where it is NULL) to row dst_rows[i] of dst, for i in 0..n-1; strides in bytes. The two must not overlap. */
void at_rows_move(uint8_t *dst, uint64_t dst_stride, const int64_t *dst_rows, const uint8_t *src, uint64_t src_stride,
                  const int64_t *src_rows, uint64_t n, uint64_t nbytes);
/* Row t of out = the sum over k of weights[t][k] * the row at address rows[t][k], hidden elements each; rows and weights are
 * [tokens][choices], and an address of 0 is left out. Summed in float32, in the order of k, each product rounded before it is
 * added: the bits are the same on every processor. A sum that is no number becomes the one quiet NaN. Out must not overlap any row. */
void at_rows_weigh(uint8_t *out, uint64_t out_stride, int out_kind, const uint64_t *rows, int kind, const float *weights,
                   uint64_t tokens, uint64_t choices, uint64_t hidden);
/* Tests: use instructions up to `level` (0: plain C, 1: AVX2 and F16C, 2: AVX-512) as far as the processor has them. Returns the
 * level in use. */
int at_rows_limit(int level);
