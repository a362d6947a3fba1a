"""Where verbs cannot be used, and the reason that is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiotransfer.providers import native
from aiotransfer.providers.fabric import libibverbs


def device(root: Path, name: str, driver: str) -> None:
    where = root / "sys" / "class" / "infiniband" / name / "device"
    where.mkdir(parents=True)
    (where / "driver").symlink_to(f"../drivers/{driver}")


@pytest.fixture(autouse=True)
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "has_verbs", True)
    monkeypatch.setattr(libibverbs, "SYSTEM_FOLDERS", ())


def installed(folder: Path) -> dict[str, str]:
    (folder / libibverbs.FILE).touch()
    return {"LD_LIBRARY_PATH": str(folder)}


def test_a_machine_without_a_device_says_so(tmp_path: Path) -> None:
    assert libibverbs.missing(installed(tmp_path), tmp_path) == "this machine has no RDMA device"


def test_a_device_of_efa_is_none_for_verbs(tmp_path: Path) -> None:
    device(tmp_path, "rdmap0s31", "efa")
    assert "no RDMA device" in str(libibverbs.missing(installed(tmp_path), tmp_path))


def test_a_device_without_the_library_says_what_to_install(tmp_path: Path) -> None:
    device(tmp_path, "mlx5_0", "mlx5_core")
    assert "apt-get install libibverbs1 ibverbs-providers" in str(libibverbs.missing({}, tmp_path))


def test_a_device_and_the_library_are_enough(tmp_path: Path) -> None:
    device(tmp_path, "mlx5_0", "mlx5_core")
    device(tmp_path, "mlx5_1", "mlx5_core")
    environ = installed(tmp_path)
    assert libibverbs.missing(environ, tmp_path) is None
    assert libibverbs.missing({**environ, libibverbs.DEVICE: "mlx5_1"}, tmp_path) is None
    assert "none of mlx5_0, mlx5_1" in str(libibverbs.missing({**environ, libibverbs.DEVICE: "mlx5_7"}, tmp_path))


def test_an_extension_without_the_headers_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device(tmp_path, "mlx5_0", "mlx5_core")
    monkeypatch.setattr(native, "has_verbs", False)
    assert "libibverbs-dev" in str(libibverbs.missing(installed(tmp_path), tmp_path))
