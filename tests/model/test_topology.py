"""CPU lists, PCI addresses, and finding things by their names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotransfer.model.topology import Gpu, Nic, Place, Topology, cpus_of, cpus_text, short_address


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("", []), ("0", [0]), ("0-3\n", [0, 1, 2, 3]), ("0-1,4,8-9", [0, 1, 4, 8, 9]), ("5,5,4-6", [4, 5, 6])],
)
def test_lists_of_cpus_are_read_as_the_kernel_writes_them(text: str, cpus: list[int]) -> None:
    assert cpus_of(text) == frozenset(cpus)


@pytest.mark.parametrize("text", ["a", "1-", "-1", "3-1", "0-99999999999", "1;2", "0-3:2/4", "(null)"])
def test_what_is_no_list_of_cpus_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        cpus_of(text)


@given(st.frozensets(st.integers(0, 400)))
def test_cpus_survive_being_written_and_read(cpus: frozenset[int]) -> None:
    text = cpus_text(cpus)
    assert cpus_of("" if text == "none" else text) == cpus


@pytest.mark.parametrize(
    "address", ["0000:1b:00.0", "0000:1B:00.0", "00000000:1B:00.0", "1b:00.0", " 0000:1b:00.0\n"]
)
def test_a_pci_address_is_the_same_however_it_is_written(address: str) -> None:
    assert short_address(address) == "0000:1b:00.0"


def test_other_domains_are_kept_and_nonsense_is_nobodys_address() -> None:
    assert short_address("10000:e1:00.0") == "10000:e1:00.0"
    assert short_address("00000008:01:00.0") == "0008:01:00.0"
    assert Topology(gpus=(Gpu(0, Place("0000:1b:00.0", "pci0000:15")),)).gpu("cuda:0") is None
    assert Topology().gpu("") is None


def test_a_nic_is_found_by_its_own_name_before_that_of_an_interface() -> None:
    one, two = Nic("eth0", interfaces=("eth9",)), Nic("mlx5_0", interfaces=("eth0", "eth1"))
    machine = Topology(nics=(two, one))
    assert machine.nic("eth0") is one
    assert machine.nic("eth1") is two
    assert machine.nic("eth2") is None
