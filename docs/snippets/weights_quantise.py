import numpy as np

from aiotransfer.weights.kernels import NotFiniteError, numbers, quantise, quantise_parts

weight = np.full((300, 200), 0x3FC0, np.uint16)  # 1.5 as bfloat16, which NumPy does not have
weight[:128, :128] = 0
codes, scales = np.empty(weight.shape, np.uint8), np.empty((3, 2), np.float32)
given = numbers(codes, "float8_e4m3fn"), scales, numbers(weight, "bfloat16")

quantise(*given)  # all of it
quantise(*given, rows=(128, 300))  # or some rows, from a block on
for done in quantise_parts(*given, part_bytes=1 << 20):  # or in steps, between which a worker thread can stop
    print(done, "bytes of the source")
print(scales[0, 0], scales[2, 1] * 448, hex(codes[299, 199]))  # 0x7e is 448

weight[130, 7] = 0x7FC0
try:
    quantise(*given)
except NotFiniteError as error:
    print(error, error.position)
