"""The table of what each provider has, made from the code's own records: what the flags of a rail say, the tables of functions
that the ports are, and the constants of their headers.

    python -m tests.docs.capabilities      writes it into docs/fabrics/index.md
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from aiotransfer.providers import native
from tests.providers.fabric.test_efa import RECORDS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "fabrics" / "index.md"
EFA = "efa-direct, RDMA write (p5; the RMA size is synthetic)"
BEGIN, END = "<!-- made by python -m tests.docs.capabilities -->", "<!-- end -->"


def source(name: str) -> str:
    """A file of the native code."""
    return (ROOT / "ffi" / name).read_text()


def constant(name: str, file: str) -> int:
    """A number that a `#define` gives, shifts included."""
    found = re.search(rf"^#define {name} (.+?)(?:\s*/\*.*)?$", source(file), re.MULTILINE)
    assert found is not None, f"{file} has no {name}"
    text = re.sub(r"\(uint64_t\)|UINT64_C", "", found[1])
    parts = [int(number) for number in re.findall(r"\d+", text)]
    return parts[0] << parts[1] if "<<" in text else parts[0]


def port(file: str) -> set[str]:
    """The functions that a port has."""
    found = re.search(r"const at_port \w+ = \{(.*?)\n\};", source(file), re.DOTALL)
    assert found is not None
    return set(re.findall(r"^\s*\.(\w+) =", found[1], re.MULTILINE))


def size(n: int) -> str:
    """Bytes in words."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if n >= 1 << shift:
            return f"{n >> shift} {unit}"
    return str(n)


class Rail(NamedTuple):
    """What a rail of the fabric provider says of itself."""

    flags: int
    most_posted: int
    most_bytes: int
    iov: int

    def has(self, name: str) -> bool:
        """One of its flags."""
        return bool(self.flags & getattr(native.lib, f"AT_FAB_{name}"))


def libfabric_rail(record: str) -> Rail:
    """What a recorded answer of libfabric makes of one. See `tests/providers/fabric/test_efa.py`."""
    facts = native.ffi.new("at_fab_facts *")
    assert native.lib.at_ofi_facts_of(*RECORDS[record], 0, facts) == 0
    return Rail(facts.flags, facts.most_posted, facts.most_bytes, constant("AT_FAB_IOV", "fabric/fabric.h"))


def verbs_rail() -> Rail:
    """Of any device."""
    return Rail(native.lib.at_verbs_flags(), 0, constant("MOST_BYTES", "verbs/open.c"), 1)


def fabric_column(rail: Rail, memory: str) -> dict[str, str]:
    """One provider of the fabric kind."""
    window, piece = constant("AT_FAB_WINDOW", "fabric/fabric.h"), constant("AT_FAB_PIECE", "fabric/fabric.h")
    pages = constant("AT_FAB_MOST_COUNT", "fabric/fabric.h")
    known = rail.has("MARKS") or rail.has("SENDERS")
    counted = rail.has("PRIVATE") and rail.has("ORDERED") and known
    return {
        "immediate": f"32 bits, for up to {pages:,} pages" if rail.has("MARKS") else "32 bits, one page each",
        "pages of one work request": f"up to {rail.iov} pieces" if rail.has("MARKS") else "neighbours that do not count",
        "the sender of an immediate": "known" if known else "not known: early values are bounded for the rail",
        "order of writes to one peer": "as posted" if rail.has("ORDERED") else "none: a large write's immediate follows it",
        "proof that a write has landed": "delivery asked for with each" if rail.has("DELIVERY") else "its completion",
        "work requests under way": f"{window} for each peer" + f", {rail.most_posted} for each rail" * bool(rail.most_posted),
        "one work request": f"pieces of {size(min(piece, rail.most_bytes))}, pages of any size up to {limit(rail.most_bytes)}",
        "fence of one peer": "its connection is closed" if rail.has("PRIVATE") else "none: quarantine",
        "after a break": "opened again, counts exact" if counted else "`RailBrokenError`",
        "wait object": "descriptor of the queue" if rail.has("FD") else "none: a thread looks",
        "local memory": "registered at first use" if rail.has("LOCAL_MR") else "as it is",
        "memory of a GPU": memory,
    }


def limit(most: int) -> str:
    """The most bytes of one work request."""
    return "what memory there is" if most >= 1 << 62 else size(most)


def columns() -> dict[str, dict[str, str]]:
    """By provider."""
    shm, sim = port("shm/peer.c"), port("sim/peer.c")
    assert "post" not in shm
    assert {"move", "count", "bar", "inside"} <= shm
    assert {"post", "fence"} <= sim
    assert "move" not in sim
    return {
        "shm": {
            "immediate": "32 bits, for any number of units",
            "pages of one work request": "all of a call",
            "the sender of an immediate": "known",
            "order of writes to one peer": "none: an immediate follows its bytes",
            "proof that a write has landed": "the copy has been made",
            "work requests under way": "none: copies are made by the call or a thread",
            "one work request": f"pieces of {size(constant('AT_CHUNK', 'lane/lane.h'))}, any size",
            "fence of one peer": "epoch words; one that stands inside a piece: quarantine" if "inside" in shm else "none",
            "after a break": "it does not break: processes end",
            "wait object": "a doorbell (eventfd) for each peer" if "rung" in shm else "none",
            "local memory": "as it is",
            "memory of a GPU": "no",
        },
        "tcp": fabric_column(libfabric_rail("tcp (2.5, measured)"), "no: staged"),
        "efa": fabric_column(libfabric_rail(EFA), "asked for, where the library has it"),
        "verbs": fabric_column(verbs_rail(), "as dma-buf, where the device says so"),
        "loopback": {
            "immediate": "32 bits, one unit each",
            "pages of one work request": "one",
            "the sender of an immediate": "known",
            "order of writes to one peer": "none: by its seed",
            "proof that a write has landed": "its completion",
            "work requests under way": f"{constant('WINDOW', 'sim/peer.c')} for each peer",
            "one work request": "one unit",
            "fence of one peer": "what is under way is dropped" if "fence" in sim else "none",
            "after a break": "`RailBrokenError`",
            "wait object": "none: virtual time, or the loop",
            "local memory": "as it is",
            "memory of a GPU": "no",
        },
    }


def table() -> str:
    """Providers across, a line for each capability."""
    made = columns()
    lines = [f"| | {' | '.join(f'`{name}`' for name in made)} |", "|---|" + "---|" * len(made)]
    for what in made["shm"]:
        lines.append(f"| {what} | {' | '.join(column[what] for column in made.values())} |")
    return "\n".join(lines)


def written() -> str:
    """What the page has."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}")
