"""The key file and the key variable: what cannot be trusted is one error with a hint, and nothing is left open or behind."""

from __future__ import annotations

import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from aiotransfer.control import key as module
from aiotransfer.control.key import KEY_BYTES, load_key
from aiotransfer.errors import ConfigurationError


def place(tmp_path: Path) -> tuple[dict[str, str], Path]:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    load_key(None, environ)
    return environ, tmp_path / "aiotransfer" / "key"


@pytest.mark.parametrize("kind", ["directory", "fifo", "empty", "long", "group", "other owner", "dangling", "read by others"])
def test_anything_but_a_private_file_of_the_right_size_is_refused(tmp_path: Path, kind: str) -> None:
    environ, file = place(tmp_path)
    file.unlink()
    if kind == "directory":
        file.mkdir(mode=0o700)
    elif kind == "fifo":
        os.mkfifo(file, 0o600)
    elif kind == "dangling":
        file.symlink_to(tmp_path / "nowhere")
    else:
        file.write_bytes(bytes({"empty": 0, "long": KEY_BYTES + 1}.get(kind, KEY_BYTES)))
        file.chmod({"group": 0o620, "read by others": 0o604}.get(kind, 0o600))
        if kind == "other owner":
            if os.getuid() != 0:
                pytest.skip("only root may give a file away")
            os.chown(file, 12345, -1)
    with pytest.raises(ConfigurationError, match="cannot be trusted") as caught:
        load_key(None, environ)
    assert "AIOTRANSFER_KEY" in str(caught.value.hint)
    assert str(file) in str(caught.value)


def test_a_directory_of_somebody_else_or_that_is_a_link_is_refused(tmp_path: Path) -> None:
    environ, file = place(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    file.parent.rename(elsewhere)
    file.parent.symlink_to(elsewhere)
    with pytest.raises(ConfigurationError, match="directory"):
        load_key(None, environ)
    file.parent.unlink()
    file.parent.write_text("a file")
    with pytest.raises(ConfigurationError, match="cannot be trusted"):
        load_key(None, environ)


def test_a_creator_that_fails_says_so_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(module.os, "link", refuse)
    with pytest.raises(ConfigurationError, match="no links here"):
        load_key(None, {"XDG_RUNTIME_DIR": str(tmp_path)})
    assert list((tmp_path / "aiotransfer").iterdir()) == []


def test_a_file_that_is_there_already_wins_over_a_racing_creator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, other = os.link, bytes(range(KEY_BYTES))

    def lose(temporary: str, path: Path) -> None:
        path.write_bytes(other)
        path.chmod(0o600)
        link(temporary, path)

    monkeypatch.setattr(module.os, "link", lose)
    key = load_key(None, {"XDG_RUNTIME_DIR": str(tmp_path)})
    assert key.verify("dialer", b"t", module.Key("file", other).mac("dialer", b"t"))
    assert [f.name for f in (tmp_path / "aiotransfer").iterdir()] == ["key"]


def test_processes_that_race_for_the_first_key_agree(tmp_path: Path) -> None:
    code = (
        "import sys; from aiotransfer.control.key import load_key; "
        "print(load_key(None, {'XDG_RUNTIME_DIR': sys.argv[1]}).mac('dialer', b't'))"
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) for _ in range(6)
    ]
    assert len({racer.communicate(timeout=60)[0] for racer in racers}) == 1
    assert {racer.returncode for racer in racers} == {0}


def test_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        _, file = place(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_without_a_runtime_directory_there_is_still_one_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    load_key(None, {"XDG_RUNTIME_DIR": "/nowhere/at/all"})
    assert (tmp_path / f"aiotransfer-{os.getuid()}" / "key").exists()


def test_the_variable_is_a_shared_key_and_a_bad_one_is_named() -> None:
    shared = load_key(None, {"AIOTRANSFER_KEY": "a long enough secret"})
    given = load_key(b"a long enough secret", {"AIOTRANSFER_KEY": "another long secret"})
    assert shared.kind == given.kind == "shared"
    assert shared.mac("dialer", b"t") == given.mac("dialer", b"t"), "an argument wins over the variable"
    with pytest.raises(ConfigurationError, match="AIOTRANSFER_KEY"):
        load_key(None, {"AIOTRANSFER_KEY": "short"})
    raw = os.fsdecode(b"\xff" * 16)  # what the environment holds need not be text
    assert load_key(None, {"AIOTRANSFER_KEY": raw}).mac("dialer", b"t") == load_key(b"\xff" * 16, {}).mac("dialer", b"t")


def test_a_key_is_never_shown() -> None:
    key = load_key(b"very secret indeed", {})
    assert "secret" not in repr(key) + str(key) + f"{key}"
    assert key.mac("dialer", b"t") != key.mac("acceptor", b"t")
    assert not key.verify("acceptor", b"t", key.mac("dialer", b"t"))
    with pytest.raises(TypeError, match="not written down"):
        pickle.dumps(key)
