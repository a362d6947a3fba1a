"""What the prediction for large models is made of: costs of stages, rates of NICs, published figures; each
with its source.

Written down before anything was compared with them. What has been mended since stands in
docs/design/weights-scale.md.
"""

from __future__ import annotations

from typing import NamedTuple

PAPER = "arXiv 2510.27656"
TABLE_5 = f"{PAPER} v2, table 5: Kimi-K2 from 256 trainers (FSDP 16, PP 2, EP 8) in bf16 to 128 ranks (EP 32) in fp8, one rank"


class Constant(NamedTuple):
    """A number, its unit, and where it stands."""

    value: float
    unit: str
    source: str


class Stage(NamedTuple):
    """A row of the paper's table: milliseconds in all, calls (0: not given), and what its time grows with:
    "bytes" (of the trainers' weights for each trainer rank), "calls" (parameters of a rank), or "wire" (what
    is left of the bytes' way)."""

    name: str
    total_ms: float
    calls: int
    by: str


STAGES = (
    Stage("H2D memcpy", 184, 487, "bytes"),
    Stage("full_tensor()", 518, 974, "bytes"),
    Stage("fuse projections", 18, 487, "calls"),
    Stage("quantise", 88, 647, "bytes"),
    Stage("RDMA submit", 26, 1144, "calls"),
    Stage("waiting for other ranks", 357, 0, "wire"),
    Stage("remaining", 42, 0, "wire"),
)
TOTAL_MS = Constant(1233, "ms", TABLE_5)
STAGE_BYTES = Constant(2 * 1026.4e9 / 256, "bytes", f"bf16 weights of Kimi-K2 for each of 256 ranks, beside {TABLE_5}")
STAGE_PARAMETERS = Constant(487, "calls", f"copies to the GPU, one for each parameter that a rank holds: {TABLE_5}")

NIC_GBIT = Constant(400, "Gbit/s", f"{PAPER} v2, testbeds: 2 x 200 (EFA) or 1 x 400 (ConnectX-7) for each GPU")
NIC_USED = Constant(
    364 / 400, "", f"{PAPER} v2, table 2: paged writes of 64 KiB reach 364 of 400 Gbit/s on EFA (370 on ConnectX-7)"
)
POST_US = Constant(0.50, "us", f"{PAPER} v2, table 9: a posted write on EFA (27.9 us for 56; 0.15 us each on ConnectX-7)")
CALL_US = Constant(23, "us", f"a submit: {TABLE_5}")


class Published(NamedTuple):
    """A published figure for a whole update. `model`: whose placement here is comparable ("" where none is),
    with `trainers`, `inference`, `inference_ep` (ranks of an instance), `quantise`, `offloaded` (as
    `Placement` has them), and `seconds`; `assumed`: what its source does not say."""

    what: str
    seconds: float
    source: str
    model: str = ""
    trainers: int = 0
    inference: int = 0
    fsdp: int = 0
    pp: int = 1
    ep: int = 1
    inference_ep: int = 0
    quantise: bool = True
    assumed: str = ""
    gb_per_gpu: float = 0.0  # received by each inference rank
    most_sent_gb: float = 0.0  # by a trainer rank
    offloaded: bool = True


PUBLISHED = (
    Published(
        "Kimi-K2, 256 to 128 (the paper, v2)", 1.233, TABLE_5, "kimi-k2", 256, 128, 16, 2, 8, 32,
        assumed="dense weights are whole on each inference rank",
    ),
    Published(
        "Kimi-K2, 256 to 128 (the paper, v1)", 1.3, f"{PAPER} v1, and its authors' blog of 2025-09-24", "kimi-k2", 256, 128,
        16, 2, 8, 32, assumed="as above",
    ),
    Published(
        "Qwen3-235B, 128 to 32 (2025-09)", 2.0, "le.qun.ch/en/blog/2025/09/07/rl-weight-transfer", "qwen3-235b", 128, 32, 16, 1,
        8, 8, assumed="FSDP 16, EP 8; four instances of EP 8, by its 37.688 GB a GPU", gb_per_gpu=37.688, most_sent_gb=11.476,
    ),
    Published(
        "Qwen3-235B, 128 to 32 (later)", 1.69, "le.qun.ch/en/blog/2025/09/07/rl-weight-transfer and what followed",
        "qwen3-235b", 128, 32, 16, 1, 8, 8, assumed="as above", gb_per_gpu=37.688, most_sent_gb=11.476,
    ),
    Published(
        "Qwen3-235B, 8 to 8 H100, bf16", 3.25, "github.com/vllm-project/vllm/pull/43375: 472 GB, 3.2 to 3.3 s", "qwen3-235b", 8,
        8, 8, 1, 1, 8, False, offloaded=False,
        assumed="FSDP 8 within a host, weights on the GPUs, one instance of EP 8 and DP 8: so its example and its table",
    ),
    Published(
        "Qwen3-235B, 16 to 16, bf16 (the same code in SkyRL)", 3.54,
        "github.com/NovaSky-AI/SkyRL/pull/2090: 470 GB; an NCCL broadcast there: 64.72 s", "qwen3-235b", 16, 16, 1, 2, 8, 16,
        False, offloaded=False, assumed="PP 2, EP 8, weights on the GPUs, one instance of EP 16 and DP 16; its TP 4 is left out",
    ),
    Published(
        "Kimi-K2 in SGLang over Mooncake", 7.2, "Mooncake's README, 2026-04 (53 s before)", "kimi-k2", 256, 128, 16, 2, 8, 32,
        assumed="everything: its placements are not published",
    ),
    Published(
        "1 T parameters by checkpoint-engine", 18.0, "checkpoint-engine's README: 16 to 20 s", "kimi-k2", 256, 128, 16, 2, 8, 32,
        assumed="everything: another way, files and broadcasts",
    ),
    Published("GLM-5.2, 64 to 32 H200, bytes on the wire", 1.864, "github.com/PrimeIntellect-ai/prime-rl/pull/3341: RDMA alone",
              gb_per_gpu=82.5),
    Published("GLM-5.2, 64 to 32 H200, whole update", 2.842, "github.com/PrimeIntellect-ai/prime-rl/pull/3341", gb_per_gpu=82.5),
    Published("host to host by TCP (TPU), 2.13 GB", 2.11, "github.com/volcengine/verl/pull/7982: 1.01 GB/s (16.32 s before)",
              gb_per_gpu=2.13),
    Published("Ray RDT", 0.307, "github.com/inclusionAI/AReaL/pull/1305 (awex there: 0.118 s)"),
)  # fmt: skip
