"""EFA without the hardware: what follows from what its library says.

The records are what libfabric's EFA provider reports: memory modes, 4 bytes of completion data, no order, the options of its
endpoints (man page fi_efa(7) and prov/efa of libfabric 2.6; sizes are marked synthetic where the page gives none). How the code
then behaves is tested on tcp with the same things taken away (`test_fabric.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aiotransfer.providers import native
from aiotransfer.providers.fabric import libfabric
from aiotransfer.providers.fabric.provider import libfabric_names
from aiotransfer.providers.selection.availability import availability

pytestmark = pytest.mark.skipif(not native.has_fabric, reason="built without libfabric's headers")

LOCAL, VIRT, ALLOCATED, PROV_KEY = 1 << 2, 1 << 4, 1 << 5, 1 << 6  # FI_MR_* (fi_domain.h)
WAW = 1 << 4  # FI_ORDER_WAW (fabric.h)
MODES = VIRT | ALLOCATED | PROV_KEY
RECORDS = {  # device, order, bytes of data, memory modes, most of one RMA, emulated writes
    "efa-direct, RDMA write (p5; the RMA size is synthetic)": (1, 0, 4, MODES | LOCAL, 1 << 30, 0),
    "efa, RDMA write (p5)": (1, 0, 4, MODES, 0, 0),
    "efa, emulated writes (p4d)": (1, 0, 4, MODES, 0, 1),
    "tcp (2.5, measured)": (0, WAW, 8, 0, 0, 0),
}


def facts(name: str, without: int = 0) -> Any:
    out = native.ffi.new("at_fab_facts *")
    assert native.lib.at_ofi_facts_of(*RECORDS[name], without, out) == 0
    return out


def has(record: Any, *names: str) -> set[str]:
    return {name for name in names if record.flags & getattr(native.lib, f"AT_FAB_{name}")}


@pytest.mark.parametrize("name", [name for name in RECORDS if "efa" in name])
def test_srd_is_neither_trusted_to_order_nor_to_name_the_sender_nor_to_flush_one_peer(name: str) -> None:
    record = facts(name)
    assert has(record, "ORDERED", "MARKS", "PRIVATE") == set()
    assert has(record, "VIRTUAL", "KEYS") == {"VIRTUAL", "KEYS"}
    assert record.most_posted == 256


def test_only_emulated_writes_ask_for_delivery() -> None:
    assert has(facts("efa, emulated writes (p4d)"), "DELIVERY")
    assert not has(facts("efa, RDMA write (p5)"), "DELIVERY")
    assert has(facts("tcp (2.5, measured)"), "DELIVERY")


def test_the_direct_fabric_wants_local_memory_registered_and_splits_what_is_too_large() -> None:
    direct = facts("efa-direct, RDMA write (p5; the RMA size is synthetic)")
    assert has(direct, "LOCAL_MR")
    assert direct.most_bytes == 1 << 30
    plain = facts("efa, RDMA write (p5)")
    assert not has(plain, "LOCAL_MR")
    assert plain.most_bytes == (1 << 64) - 1


def test_tcp_has_what_failover_needs() -> None:
    assert has(facts("tcp (2.5, measured)"), "ORDERED", "MARKS", "PRIVATE") == {"ORDERED", "MARKS", "PRIVATE"}
    assert has(facts("tcp (2.5, measured)", native.lib.AT_FAB_MARKS), "MARKS") == set()


def test_the_direct_fabric_is_asked_for_first() -> None:
    assert libfabric_names("efa", 2 << 16 | 5)[0] == ("efa", "efa-direct")
    assert libfabric_names("tcp", 1 << 16 | 17)[0] == ("net", None)
    assert libfabric_names("tcp", 2 << 16) == (("tcp", None),)


def test_a_machine_without_the_device_says_so(tmp_path: Path) -> None:
    assert "no EFA device" in str(libfabric.no_efa(tmp_path))
    for name, driver in (("mlx5_0", "mlx5_core"), ("rdmap0s6", "efa")):
        device = tmp_path / "sys" / "class" / "infiniband" / name / "device"
        device.mkdir(parents=True)
        (device / "driver").symlink_to(f"../../bus/pci/drivers/{driver}")
        assert (libfabric.no_efa(tmp_path) is None) == (driver == "efa")
    assert availability()["efa"] is not None or libfabric.no_efa() is None
