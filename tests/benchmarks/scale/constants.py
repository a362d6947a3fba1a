"""What the model of `tests/benchmarks/scale` takes as given: each figure with its unit and where it is from.

Two rules. A figure is measured by us (with the command), published for something smaller than a dispatch or combine (with the
place), or assumed (and says so). And none was chosen by how well the model then fits: this file was committed before the model
and before the tables that it is compared with (whoever wrote it had seen those tables, though). A later change to a figure is a
commit of its own that says what was wrong with it.

Times are microseconds, sizes bytes, rates bytes for each microsecond (1,000 of these are 1 GB/s).
"""

from __future__ import annotations

from typing import NamedTuple


class Constant(NamedTuple):
    """A figure, what it is and where it is from."""

    value: float
    unit: str
    what: str
    source: str


def gbps(rate: float) -> float:
    """Gigabits a second as bytes a microsecond."""
    return rate * 125.0


PAPER = "arXiv 2510.27656"
DEEPEP = "DeepEP docs/legacy.md"
OURS = "`make bench-moe-host`, 2026-11-28"
VERBS = "`make bench-verbs`"
NCCL = "p2pBandwidthLatencyTest on HGX H100, github.com/NVIDIA/nccl/issues/1264"
SHEETS = f"{NCCL}, and NVIDIA's data sheets"
NOTES = (
    "Ours: AMD EPYC, one of two shared cores, load below 0.5. `make bench-verbs` as docs/design/on-paper.md has it (2026-11-25). "
    "Measured again on 2026-11-28: 0.156 and 0.150 for a write of a scatter and 0.020 for an arrival, a "
    "fifth to a third less; the figures of that page are kept.",
    "DeepEP: https://github.com/deepseek-ai/DeepEP.",
)

# ---- the shape: DeepSeek-V3 as the paper and DeepEP measure it ----
HIDDEN = Constant(7168, "elements", "of a token", f"{PAPER}; {DEEPEP}")
SCALES = Constant(56, "fp32", "scales of a dispatched row, one for 128 elements", PAPER)
TOP = Constant(8, "experts", "of a token", f"{PAPER}; {DEEPEP}")
EXPERTS = Constant(256, "experts", "routed; on 512 ranks two copies of each, one drawn for each row", f"{PAPER}; copies assumed")
NODE = Constant(8, "ranks", "of a host, by NVLink", PAPER)
DISPATCH_ROW = Constant(7168 + 56 * 4, "bytes", "of a row on its way out: fp8 and scales", "from the two above")
COMBINE_ROW = Constant(7168 * 2, "bytes", "of a row on its way back: bf16", f"{PAPER}; {DEEPEP}")
HEADER = Constant(8, "bytes", "of a header, and 4 for each expert", "docs/design/moe.md (step, counts); the widths assumed")


class Fabric(NamedTuple):
    """NICs of a rank."""

    nics: int
    rate: Constant  # of one NIC
    message: Constant  # the least time of one message in one NIC
    latency: Constant  # from posting until its immediate can be counted, without the time of its bytes


def one_way(microseconds: float, rate: float) -> float:
    """Half of what is left of an awaited 64-KiB write when its bytes and the way to the first post (1.416) are taken off."""
    return (microseconds - 64 * 1024 / rate - FIRST_POST.value) / 2


FIRST_POST = Constant(
    0.120 + 0.855 + 0.441, "us", "the paper's engine: from the call to the first post (p50)", f"{PAPER}, Table 8"
)

CX7 = Fabric(
    1,
    Constant(gbps(378), "B/us", "ConnectX-7, one of 400 Gbps: single writes of 32 MiB reach 378 Gbps", f"{PAPER}, Table 2"),
    Constant(1 / 11.10, "us", "a message: 11.10 M/s pages of 1 KiB", f"{PAPER}, Table 2 (sender and NIC: an upper bound)"),
    Constant(
        one_way(64 * 1024 / gbps(44), gbps(378)),
        "us",
        "one way, from single writes of 64 KiB at 44 Gbps",
        f"{PAPER}, Table 2; both ways taken alike",
    ),
)
EFA = Fabric(
    2,
    Constant(gbps(364) / 2, "B/us", "EFA, one of two of 200 Gbps: pages of 64 KiB reach 364 over both", f"{PAPER}, Table 2"),
    Constant(
        2 / 2.11, "us", "a message: 2.11 M/s pages of 1 KiB over both", f"{PAPER}, Table 2 (sender and NIC: an upper bound)"
    ),
    Constant(
        one_way(64 * 1024 / gbps(16), gbps(364)),
        "us",
        "one way, from single writes of 64 KiB at 16 Gbps",
        f"{PAPER}, Table 2; both ways taken alike",
    ),
)


class Gpu(NamedTuple):
    """What a kernel and NVLink do."""

    memory: Constant
    nvlink: Constant  # one direction


H100 = Gpu(
    Constant(2.495e6, "B/us", "memory of an H100 SXM, reads and writes added, as a plain copy reaches them", NCCL),
    Constant(0.376e6, "B/us", "NVLink of an H100, one direction, writes", NCCL),
)
H800 = Gpu(
    H100.memory,
    Constant(0.160e6, "B/us", "NVLink of an H800, one direction", f"{DEEPEP}: ~160 GB/s NVLink maximum bandwidth"),
)
H200 = Gpu(
    Constant(2.495e6 * 4.8 / 3.35, "B/us", "memory of an H200: the H100's by the ratio 4.8 to 3.35 TB/s", SHEETS),
    H100.nvlink,
)
B200 = Gpu(
    Constant(2.495e6 * 8.0 / 3.35, "B/us", "memory of a B200: the H100's by the ratio 8 to 3.35 TB/s", SHEETS),
    Constant(0.376e6 * 2, "B/us", "NVLink of a B200: the H100's by the ratio 1.8 to 0.9 TB/s", SHEETS),
)
LAUNCH = Constant(5.0, "us", "until a kernel runs: the middle of 4 to 6", "susun-blog.com/blog/pegainfer-3-cuda-graph (no graph)")
NVLINK_LATENCY = Constant(1.9, "us", "a store to a neighbour's memory", "github.com/NVIDIA/cuda-samples/issues/230 (1.8 to 2.3)")
CROSSING = Constant(2.0, "us", "host and GPU see each other's word: the low end of the bus's 2 to 5", f"{PAPER}, beside Table 4")


class Host(NamedTuple):
    """What a rank's thread on the CPU costs. Each figure but `notice` occupies that thread."""

    name: str
    notice: Constant  # a GPU's word is seen
    plan: dict[int, Constant]  # by tokens: the rows are sorted on the host, before they can be packed
    ranges_call: Constant  # the ranges out of all headers ...
    ranges_entry: Constant  # ... and for each count in them
    first: Constant  # of a scatter, before anything is posted ...
    target: Constant  # ... and for each target
    post: dict[str, Constant]  # by fabric: handing one write to the driver
    arrival: Constant
    wake: Constant  # after the last one


def none(what: str) -> Constant:
    """No cost at all."""
    return Constant(0.0, "us", what, "not there: native code, or on the GPU")


WRITE = 0.196  # of a prepared scatter: `make bench-verbs`
PAGES_1K = {"cx7": 1 / 11.10, "efa": 1 / 2.11}
ENTRY = Constant(0.00012, "us", "ranges, each count of [ranks, experts]", f"{OURS}: (41.6 - 9.9) / (512 x 512 - 8 x 256)")
POST = {
    "cx7": Constant(WRITE + 0.05, "us", "a write of a scatter: ours 0.196, driver 0.05", f"{VERBS}; the driver's part assumed"),
    "efa": Constant(
        WRITE + PAGES_1K["efa"],
        "us",
        "a write of a scatter: ours 0.196, EFA provider 0.474 (2.11 M/s)",
        f"{VERBS}; {PAPER}, Table 2: at most",
    ),
}
COUNT = Constant(0.030, "us", "an immediate that arrives and is counted", VERBS)
RUST_NOTICE = Constant(6.2, "us", "a GPU's word, until native code is called (p50)", f"{PAPER}, Table 4, Rust")

NATIVE = Host(
    "native post only",
    RUST_NOTICE,
    {128: none("rows sorted in the pack kernel"), 4096: none("rows sorted in the pack kernel")},
    none("ranges, the call"),
    ENTRY,
    none("a scatter, before its first post"),
    none("each target, before the first post"),
    POST,
    COUNT,
    none("wake-up"),
)
PYTHON = Host(
    "our Python host",
    Constant(9.3, "us", "a GPU's word, until Python is called (p50)", f"{PAPER}, Table 4, Python"),
    {
        128: Constant(12.8, "us", "plan: 1,024 rows sorted by NumPy", OURS),
        4096: Constant(1244.0, "us", "plan: 32,768 rows sorted by NumPy", OURS),
    },
    Constant(9.6, "us", "ranges: NumPy's calls", f"{OURS}: 9.9 for 8 ranks, less 2,048 counts"),
    ENTRY,
    Constant(6.9, "us", "a scatter of arrays, before its first post", f"{OURS}: 18.1 - 0.9 for 8, less 8 targets"),
    Constant(1.29, "us", "each target, before the first post", f"{OURS}: (82.9 - 18.1) - (3.8 - 0.9) for 48 more"),
    POST,
    Constant(0.030 + 0.72, "us", "an arrival: 0.030 native, and a counter that has it", OURS),
    Constant(2.4, "us", "wake-up of a loop that looks", "`make bench-rivals`, docs/design/rivals.md (2.36)"),
)
THEIRS = NATIVE._replace(
    name="the paper's posts",
    first=FIRST_POST,
    post={
        "cx7": Constant(0.15, "us", "a write of a scatter (8.502 for 56)", f"{PAPER}, Table 9"),
        "efa": Constant(0.50, "us", "a write of a scatter (27.886 for 56)", f"{PAPER}, Table 9"),
    },
)
HOSTS = (THEIRS, NATIVE, PYTHON)

# ---- choices of the protocol ----
PRIVATE = {
    "cx7": Constant(24, "rows", "of the first write, at most", f"{PAPER}: enough on CX7"),
    "efa": Constant(32, "rows", "of the first write, at most", f"{PAPER}: enough on EFA"),
    "nvlink": Constant(32, "rows", "of the first write, at most", f"{PAPER}: enough inside a host"),
}  # fmt: skip


def table() -> list[Constant]:
    """Every constant once, in the order of this file."""
    seen: dict[Constant, None] = {}

    def visit(value: object) -> None:
        if isinstance(value, Constant):
            seen.setdefault(value)
        elif isinstance(value, dict):
            for inner in value.values():
                visit(inner)
        elif isinstance(value, tuple):
            for inner in value:
                visit(inner)

    for name, value in globals().items():
        if name.isupper() or name in ("CX7", "H100", "H200", "H800", "B200"):
            visit(value)
    return list(seen)
