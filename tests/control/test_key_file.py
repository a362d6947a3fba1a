"""The key file and the key variable: what cannot be trusted is one error with a hint, and nothing is left open or behind."""

from __future__ import annotations

import base64
import errno
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aiotransfer.cli import main
from aiotransfer.cli.doctor import command as doctor
from aiotransfer.cli.doctor.facts import Host
from aiotransfer.control import key as module
from aiotransfer.control.frames import PeerInfo
from aiotransfer.control.handshake import Handshake
from aiotransfer.control.key import KEY_BYTES, load_key
from aiotransfer.errors import ConfigurationError, RendezvousError


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


def test_which_variable_chose_which_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, temporary = tmp_path / "runtime", tmp_path / "temporary"
    runtime.mkdir()
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    by_variable = load_key(None, {"XDG_RUNTIME_DIR": str(runtime)})
    assert f"{runtime / 'aiotransfer' / 'key'} (XDG_RUNTIME_DIR={runtime})" in by_variable.source
    without = load_key(None, {"TMPDIR": str(temporary)})
    assert "XDG_RUNTIME_DIR is not set" in without.source
    assert f"TMPDIR={temporary}" in without.source
    gone = load_key(None, {"XDG_RUNTIME_DIR": "/nowhere/at/all"})
    assert "XDG_RUNTIME_DIR=/nowhere/at/all is no directory" in gone.source


def test_two_files_of_one_user_are_named_on_both_sides() -> None:
    def handshake(role: Any, path: str) -> Handshake:
        key = module.Key("file", os.urandom(32), f"it is that of {path}")
        return Handshake(role, key, 1, PeerInfo("x", "", 1, []), bytes(32))

    dialer, acceptor = handshake("dialer", "/one/key"), handshake("acceptor", "/other/key")
    acceptor.receive(dialer.take_output())
    dialer.receive(acceptor.take_output())
    with pytest.raises(RendezvousError, match="/other/key"):
        acceptor.receive(dialer.take_output())
    told = acceptor.take_output()
    assert b"/other/key" not in told, "a stranger learns no path"
    with pytest.raises(RendezvousError, match="/one/key") as caught:
        dialer.receive(told)
    assert "XDG_RUNTIME_DIR" in str(caught.value.hint)


def test_a_place_that_another_user_has_taken_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    taken, home = tmp_path / f"aiotransfer-{os.getuid()}", tmp_path / "home"
    taken.mkdir(mode=0o777)
    lstat = Path.lstat

    def others(self: Path) -> os.stat_result:
        found = lstat(self)
        return os.stat_result((*found[:4], 65534, *found[5:])) if self == taken else found

    monkeypatch.setattr(Path, "lstat", others)
    with pytest.raises(ConfigurationError, match="no home directory") as caught:
        load_key(None, {"HOME": str(home)})
    assert "XDG_RUNTIME_DIR" in str(caught.value.hint)
    home.mkdir()
    key = load_key(None, {"HOME": str(home)})
    assert stat.S_IMODE((home / ".aiotransfer" / "key").stat().st_mode) == 0o600
    assert f"{taken} belongs to uid 65534" in key.source
    assert list(taken.iterdir()) == []


def test_without_a_place_that_can_be_written_to_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", nowhere)
    with pytest.raises(ConfigurationError, match="no temporary directory") as caught:
        load_key(None, {})
    assert "emptyDir" in str(caught.value.hint)
    fact = doctor.key(Host(environ={}))
    assert (fact.level, fact.hint) == ("problem", caught.value.hint)

    def read_only(self: Path, mode: int = 0, exist_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(ConfigurationError, match="cannot be made") as caught:
        load_key(None, {"XDG_RUNTIME_DIR": str(tmp_path)})
    assert "AIOTRANSFER_KEY" in str(caught.value.hint)


def test_a_guess_at_a_passphrase_costs_what_scrypt_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    scrypt = module.hashlib.scrypt

    def watched(secret: bytes, **how: int) -> bytes:
        asked.append(how["n"] * how["r"] * 128)
        return scrypt(secret, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(module.hashlib, "scrypt", watched)
    text = "correct horse battery staple"
    key = load_key(text, {})
    assert asked == [16 << 20]
    assert not key.verify("dialer", b"t", module.Key("shared", text.encode()).mac("dialer", b"t"))
    again = load_key(text.encode(), {})
    assert key.verify("dialer", b"t", again.mac("dialer", b"t"))
    assert len(asked) == 1, "once for each process"


def test_a_key_that_the_command_makes_is_random_and_needs_no_stretching(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for _ in range(2):
        assert main(["key"]) == 0
        made.append(capsys.readouterr().out.strip())
    assert len(set(made)) == 2
    assert all(len(base64.urlsafe_b64decode(text.removeprefix("atk1-") + "=")) == KEY_BYTES for text in made)
    monkeypatch.setattr(module.hashlib, "scrypt", None)
    load_key(None, {"AIOTRANSFER_KEY": made[0]})
