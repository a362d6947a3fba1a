"""What others have published for dispatch and combine, to be compared with; nothing here goes into the model."""

from __future__ import annotations

from typing import NamedTuple

from tests.benchmarks.scale import constants as c

PAGE = "github.com/perplexityai/pplx-garden docs/fabric-lib.md (commit 2446003)"
FIGURES = "arXiv 2510.27656, figures of decode latency"
LEGACY = "github.com/deepseek-ai/DeepEP docs/legacy.md"
UCCL = "github.com/uccl-project/uccl ep/README.md (commit 021c2c0)"
EFA2 = "8 H200 and 16 EFA of 200 Gbps a host"
EFA1 = "8 B200 and 8 EFA of 400 Gbps a host: rates and latency of the two 200 Gbps taken for it"
DEDUP = "sends a token once to a host, and on by NVLink; top-4 groups"


class Table(NamedTuple):
    """Microseconds by ranks: dispatch and combine."""

    system: str
    source: str
    fabric: str
    gpu: c.Gpu
    tokens: int
    rows: dict[int, tuple[float, float]]
    note: str = ""


THEIR_CODE = "the paper's engine"  # the systems whose protocol and posts the model has
DEEPEP = "DeepEP"
UCCL_EP = "UCCL-EP"

TABLES = (
    Table(
        THEIR_CODE, PAGE, "cx7", c.H100, 128, {8: (50.5, 65.3), 16: (110.2, 185.5), 32: (153.9, 266.3), 64: (187.5, 309.1)},
        "H100, CX7",
    ),
    Table(
        THEIR_CODE, PAGE, "efa", c.H200, 128, {8: (49.7, 64.2), 16: (214.8, 241.5), 32: (229.1, 335.0), 64: (266.7, 391.2)},
        "H200, 2 x 200 Gbps EFA",
    ),
    Table(
        DEEPEP, PAGE, "cx7", c.H100, 128, {8: (42.6, 72.0), 16: (123.9, 203.0), 32: (159.1, 285.0), 64: (177.9, 325.0)},
        "measured by the paper's authors, H100, CX7",
    ),
    Table(THEIR_CODE, FIGURES, "cx7", c.H100, 128, {8: (52, 65), 16: (110, 186), 32: (155, 267), 64: (190, 311)}, "earlier"),
    Table(THEIR_CODE, FIGURES, "efa", c.H200, 128, {8: (53, 64), 16: (216, 243), 32: (236, 342), 64: (286, 406)}, "earlier"),
    Table(DEEPEP, FIGURES, "cx7", c.H100, 128, {8: (43, 72), 16: (124, 203), 32: (160, 286), 64: (180, 327)}, "earlier"),
    Table(
        DEEPEP, LEGACY, "cx7", c.H800, 128,
        {8: (77, 114), 16: (118, 195), 32: (155, 273), 64: (173, 314), 128: (192, 369), 256: (194, 360)},
        "low latency, H800, CX7",
    ),
    Table(UCCL_EP, UCCL, "efa", c.H200, 128, {16: (226, 293), 24: (386, 580), 32: (465, 694)}, f"low latency, {EFA2}"),
    Table(UCCL_EP, UCCL, "efa", c.B200, 128, {16: (228, 318), 24: (448, 566), 32: (406, 617)}, f"low latency, {EFA1}"),
    Table(
        THEIR_CODE, PAGE, "cx7", c.H100, 4096,
        {8: (5071.1, 1405.1), 16: (2734.8, 1062.2), 32: (4011.8, 7526.8), 64: (4665.2, 8771.1)},
        "dispatch at EP8 and combine at EP16 break the trend of their columns: probably slips of the table; counted all the same",
    ),
    Table(
        THEIR_CODE, PAGE, "efa", c.H200, 4096,
        {8: (1052.4, 1396.7), 16: (3196.7, 5379.1), 32: (4619.0, 8271.5), 64: (5334.3, 9779.3)},
        "H200, 2 x 200 Gbps EFA",
    ),
    Table(
        DEEPEP, PAGE, "cx7", c.H100, 4096,
        {8: (1810.3, 962.9), 16: (2481.9, 1863.9), 32: (3680.2, 3565.4), 64: (5071.6, 5922.7)},
        "measured by the paper's authors, H100, CX7; its combine adds up what is for one token before it is sent",
    ),
    Table(
        UCCL_EP, UCCL, "efa", c.H200, 4096, {8: (500, 973), 16: (1196, 6379), 24: (1633, 6365), 32: (2022, 4899)},
        f"normal, {EFA2}; {DEDUP}",
    ),
    Table(
        UCCL_EP, UCCL, "efa", c.B200, 4096, {8: (571, 727), 16: (1141, 1965), 24: (1637, 2887), 32: (2072, 3724)},
        f"normal, {EFA1}; {DEDUP}",
    ),
)  # fmt: skip

FIRST_TRANSFER = (64, 15.0, "arXiv 2510.27656: the first transfer leaves about 15 us after the launch of dispatch, EP64")

LEFT_OUT = (
    f"DeepEP's normal kernels ({LEGACY}): GB/s only, each token once for each host, the own one included (58 "
    "GB/s over a NIC of 50).",
    "DeepEP V2 (its README): 8,192 tokens and GB/s of that kind.",
    f"UCCL-EP on MI300X ({UCCL}): no constants for its GPU, its links or Broadcom's NIC here.",
    "pplx-kernels over NVSHMEM (its README): neither of the three, and replaced by the paper's engine.",
)
