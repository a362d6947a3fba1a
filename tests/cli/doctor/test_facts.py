"""What `doctor` makes of machines that are not here: from folders that look like their /proc and /sys."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from aiotransfer.cli.doctor import command as doctor
from aiotransfer.cli.doctor.devices import ALL as OF_DEVICES
from aiotransfer.cli.doctor.facts import Fact, Host
from aiotransfer.cli.doctor.host import ALL as OF_HOST
from aiotransfer.config import Config
from tests.cli.doctor.trees import ALL_CAPS, CONNECTX, CONTAINER, LAPTOP, LIMITS, PORT, STATUS, ZERO, host, without


def look(where: Host) -> dict[str, Fact]:
    return {fact.name: fact for fact in (look(where) for look in (*OF_HOST, *OF_DEVICES))}


def levels(facts: dict[str, Fact]) -> dict[str, str]:
    return {name: fact.level for name, fact in facts.items() if fact.level != "ok"}


def test_a_laptop_lacks_nothing_but_free_access_to_foreign_memory(tmp_path: Path) -> None:
    facts = look(host(tmp_path, LAPTOP))
    assert levels(facts) == {"yama": "note"}
    assert facts["rdma"].data == {"devices": {}}
    assert facts["ports"].data == {"low": 32768, "high": 60999, "free": 28231}
    assert facts["interfaces"].text == "wlan0 (MTU 1500)"


def test_a_container_without_rights_is_told_which_to_ask_for(tmp_path: Path) -> None:
    facts = look(host(tmp_path, CONTAINER))
    assert set(levels(facts)) == {"yama", "container", "descriptors", "shared memory", "clock"}
    assert facts["container"].data["kinds"] == ["docker"]
    assert facts["container"].text == "docker; seccomp filter on, SYS_PTRACE no, IPC_LOCK no"
    assert "--cap-add=SYS_PTRACE" in facts["container"].hint
    assert facts["memory"].data["limit"] == 1 << 30
    assert facts["shared memory"].data == {"size": 64 << 20}


def test_too_few_descriptors_for_one_engine_are_a_problem(tmp_path: Path) -> None:
    facts = look(host(tmp_path, LAPTOP | {"/proc/self/limits": LIMITS.format(files=32, locked=0)}))
    assert facts["descriptors"].level == "problem"
    assert not doctor.works(list(facts.values()))


def test_a_connectx_host_shows_its_port_and_the_gid_to_use(tmp_path: Path) -> None:
    facts = look(host(tmp_path, CONNECTX))
    port = facts["rdma"].data["devices"]["mlx5_0"]["ports"]["1"]
    assert (port["state"], port["rate"], len(port["gids"])) == ("ACTIVE", "400 Gb/sec", 4)
    best = port["best_gid"]
    assert (best["index"], best["type"], best["interface"]) == (3, "RoCE v2", "eth2")
    assert best["gid"].endswith("ffff:0a00:0005")
    assert facts["rdma"].data["devices"]["mlx5_0"]["numa_node"] == 1
    assert facts["/dev/infiniband"].text == "uverbs0"
    assert "numactl" in facts["numa"].hint
    assert facts["cuda"].data == {
        "gpus": ["NVIDIA H100 80GB HBM3"], "driver": "550.54.15", "devices": ["nvidia0"],
        "nvidia_peermem": True, "dma_buf": False,
    }  # fmt: skip
    assert levels(facts) == {"yama": "note", "memlock": "note"}


@pytest.mark.parametrize(
    ("change", "name", "hint"),
    [
        ({f"{PORT}/state": "1: DOWN\n"}, "rdma", "port 1 is DOWN"),
        ({f"{PORT}/gids/{index}": ZERO for index in range(4)}, "rdma", "no RoCE v2 GID"),
        ({"/dev/infiniband/uverbs0": None}, "/dev/infiniband", "--device=/dev/infiniband"),
        ({"/usr/lib/x86_64-linux-gnu/libibverbs.so.1": None}, "libraries", "apt-get install libibverbs1"),
        ({"/sys/module/nvidia_peermem/version": None}, "cuda", "modprobe nvidia_peermem"),
        ({"/dev/nvidia0": None}, "cuda", "--gpus all"),
    ],
)
def test_what_a_connectx_host_may_lack(tmp_path: Path, change: dict[str, str | None], name: str, hint: str) -> None:
    files = CONNECTX
    for file, content in change.items():
        files = without(files, file) if content is None else files | {file: content}
    fact = look(host(tmp_path, files))[name]
    assert fact.level == "note"
    assert hint in fact.hint


def test_pinned_memory_is_no_matter_with_the_right_to_lock_it(tmp_path: Path) -> None:
    facts = look(host(tmp_path, CONNECTX | {"/proc/self/status": STATUS.format(caps=ALL_CAPS, seccomp=0)}))
    assert levels(facts) == {}


def test_the_open_kernel_modules_offer_dma_buf(tmp_path: Path) -> None:
    version = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n"
    assert look(host(tmp_path, CONNECTX | {"/proc/driver/nvidia/version": version}))["cuda"].data["dma_buf"]


def test_nothing_readable_is_no_crash(tmp_path: Path) -> None:
    assert levels(look(host(tmp_path, {}))) == {}


def test_text_and_json_are_made_of_the_same_records(tmp_path: Path) -> None:
    facts = list(look(host(tmp_path, CONTAINER)).values())
    report = json.loads(json.dumps(doctor.record(facts)))
    shown = doctor.text(facts)
    for fact in facts:
        assert report["facts"][fact.name]["level"] == fact.level
        assert fact.text in shown
        assert fact.hint in shown
    bad = [*facts, Fact("key", "too short", "problem")]
    assert doctor.text(bad).endswith("aiotransfer does not work here: key")
    assert doctor.record(bad)["works"] is False


def test_every_setting_is_shown_and_a_variable_that_cannot_be_used_is_a_problem() -> None:
    plain = doctor.settings(Host(environ={}))
    assert plain.text.startswith("defaults")
    assert plain.data == asdict(Config())
    changed = doctor.settings(Host(environ={"AIOTRANSFER_PEER_TIMEOUT": "7.5", "AIOTRANSFER_PIN_THREADS": "off"}))
    assert changed.text == "peer_timeout 7.5, pin_threads False (from the environment)"
    assert changed.data == asdict(Config(peer_timeout=7.5, pin_threads=False))
    for text in ("soon", "-1"):
        bad = doctor.settings(Host(environ={"AIOTRANSFER_PEER_TIMEOUT": text}))
        assert bad.level == "problem"
        assert text in bad.text
    assert not doctor.works([bad])


def test_the_key_is_judged_and_never_shown(tmp_path: Path) -> None:
    secret = "s3cret-s3cret-s3cret"
    good = doctor.key(Host(environ={"AIOTRANSFER_KEY": secret}))
    assert good.level == "ok"
    assert secret not in repr(good)
    assert doctor.key(Host(environ={"AIOTRANSFER_KEY": "short"})).level == "problem"
    (tmp_path / "aiotransfer").mkdir(mode=0o755)
    (tmp_path / "aiotransfer").chmod(0o755)
    assert doctor.key(Host(environ={"XDG_RUNTIME_DIR": str(tmp_path)})).level == "problem"
