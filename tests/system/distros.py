"""What the README promises, in fresh installations of Debian: each with its own Python, compiler and libfabric.

    make test-distros [ARGS="--suite trixie --user plain --no-demo"]

Every case is a chroot made by debootstrap, in which root, or a plain user of a machine where an administrator has installed what
the README names, sets both commands up (`make demo`, `make test`), runs `make hello` and `make check`. Root begins with nothing
but `make` and gets the rest by apt; beforehand a plain user of that bare machine must be told what is missing.

The chroots see the network as this machine does: its Debian mirror, settings of apt and pip, certificates and proxies are read
when this runs. Everything is mounted in a mount namespace of its own, so that nothing stays mounted however this ends, and what
is changed lies in memory. Fresh installations (for two weeks) and downloads are kept in ~/.cache/aiotransfer-distros
(AIOTRANSFER_DISTROS_CACHE).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUITES = ("bookworm", "trixie")
USERS = ("root", "plain")
BARE = ("ca-certificates", "make")
README = ("gcc", "libc6-dev", "python3", "python3-venv", "python3-dev", "libfabric-dev", "libibverbs-dev", "ibverbs-providers")
FRESH_SECONDS = 14 * 86400
STEP_SECONDS = 1200
UID = 1000
PRIVATE = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private", "--")
FROM_HERE = re.compile(r"(?i)^(pip_.*|https?_proxy|no_proxy|all_proxy|ssl_cert_(file|dir)|requests_ca_bundle|curl_ca_bundle)$")
OF_APT = re.compile(r"^(Acquire::(http|https|Check-|Retries)|APT::Authentication)")
PATHS = re.compile(r"(?<![\w/])(?:file://)?(/[\w.+-][\w.+/-]*)")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def run(*command: str | Path, **options: object) -> str:
    """What a command prints; raises `CalledProcessError` when it fails."""
    done = subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]
    return str(done.stdout)


def cache() -> Path:
    """Where downloads are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("AIOTRANSFER_DISTROS_CACHE") or Path(base, "aiotransfer-distros"))


def mirror() -> str:
    """This machine's mirror of Debian."""
    for line in run("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages").splitlines():
        if line.rstrip("/").endswith("/debian"):
            return line.rstrip("/")
    return "http://deb.debian.org/debian"


def base(suite: str, packages: tuple[str, ...]) -> Path:
    """A fresh installation, which is only read from: made by debootstrap unless there is one already."""
    kept = cache() / f"{suite}-{len(packages)}"
    if kept.exists() and time.time() - kept.stat().st_mtime < FRESH_SECONDS:
        return kept
    archives = cache() / "archives" / suite
    archives.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    new = kept.with_suffix(".new")
    for old in (new, kept):
        if old.exists():
            shutil.rmtree(old)
    options = ["--variant=minbase", f"--cache-dir={archives}", f"--include={','.join(packages)}"]
    done = subprocess.run([*PRIVATE, "debootstrap", *options, suite, str(new), mirror()], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"debootstrap {suite} failed:\n{done.stdout[-3000:]}")
    new.rename(kept)
    os.utime(kept)
    print(f"{suite}: installed by debootstrap in {time.monotonic() - begun:.0f} s", flush=True)
    return kept


# ---- inside the namespace ----


class Chroot:
    """A fresh installation that sees the network as this machine does."""

    def __init__(self, where: Path, suite: str) -> None:
        self.where = where
        self.suite = suite
        self.environ = {name: value for name, value in os.environ.items() if FROM_HERE.match(name)}

    def mount(self, installed: Path) -> None:
        """An installation, a layer in memory for what is changed, and what a running system has. All ends with this namespace."""
        layer = self.where.parent
        run("mount", "-t", "tmpfs", "tmpfs", layer)
        for name in ("changes", "work", self.where.name):
            (layer / name).mkdir()
        options = f"lowerdir={installed},upperdir={layer}/changes,workdir={layer}/work"
        run("mount", "-t", "overlay", "-o", options, "overlay", self.where)
        run("mount", "-t", "proc", "proc", self.where / "proc")
        run("mount", "--rbind", "/sys", self.where / "sys")
        run("mount", "--rbind", "/dev", self.where / "dev")
        run("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", self.where / "dev" / "shm")

    def bind(self, source: Path, target: Path, how: str) -> None:
        """A folder of this machine, at `target` in the chroot."""
        place = self.where / target.relative_to("/")
        place.mkdir(parents=True, exist_ok=True)
        run("mount", "--bind", source, place)
        run("mount", "-o", f"remount,bind,{how}", place)

    def copy(self, source: Path, target: Path | None = None) -> None:
        """A file or a folder of this machine, if it has it."""
        place = self.where / (target or source).relative_to("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, place, dirs_exist_ok=True)
        elif source.exists():
            shutil.copy(source, place)

    def network(self, home: Path) -> None:
        """The settings with which this machine reaches Debian's archives and Python's packages."""
        for name in ("/etc/resolv.conf", "/etc/hosts", str(CERTIFICATES), "/etc/pip.conf", "/etc/xdg/pip"):
            self.copy(Path(name))
        for name in (".config/pip/pip.conf", ".pip/pip.conf"):
            self.copy(Path.home() / name, home / name)
        for name in ("auth.conf", "auth.conf.d"):
            self.copy(Path("/etc/apt") / name)
        lines = run("apt-config", "dump").splitlines()
        (self.where / "etc/apt/apt.conf.d/90host").write_text("\n".join(filter(OF_APT.match, lines)) + "\n")
        texts = [value for name, value in self.environ.items() if name.lower().startswith("pip_")]
        for place in (self.where / "etc", self.where / home.relative_to("/")):
            texts += [file.read_text() for file in place.rglob("pip.conf")]
        for path in sorted({Path("/", *Path(path).parts[1:3]) for text in texts for path in PATHS.findall(text)}):
            if path.is_dir() and path.parts[1] != "etc":
                self.bind(path, path, "ro")  # a local index: it refers to files beside it

    def command(self, user: str, home: Path, command: str, **environ: str) -> list[str]:
        """A shell command as this user, with nothing of our environment but the settings of the network."""
        chosen = {"HOME": str(home), "USER": user, "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                  "LANG": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive", **self.environ, **environ}  # fmt: skip
        number = 0 if user == "root" else UID
        return ["env", "-i", *(f"{name}={value}" for name, value in chosen.items()),
                "chroot", f"--userspec={number}:{number}", "--groups=", str(self.where),
                "bash", "-c", f"cd {home}/aiotransfer && {command}"]  # fmt: skip


def steps(user: str, demo: bool) -> list[tuple[str, dict[str, str]]]:
    """What this user types, and the environment for it."""
    refused = "! .venv/bin/pip install --no-deps --force-reinstall . 2>refused && grep -q 'no-compiler.*not found' refused"
    chosen = [
        ("make setup", {}),
        (refused, {"CC": "no-compiler"}),  # not installed without its extension
        ("make hello", {}),
        (".venv/bin/python -m aiotransfer doctor", {}),
        ("make check", {"TESTS_REQUIRE": "tcp"}),
    ]
    if demo:
        chosen.append(("make .make/demo && .venv/bin/python -c 'import torch, transformers'", {}))
    return chosen


def date_of_python(where: Path) -> float:
    """When the system's Python was changed last, as far as its date says."""
    return max(file.stat().st_mtime for file in (where / "usr/bin").glob("python3*") if not file.is_symlink())


def inside(suite: str, user: str, demo: bool, installed: Path) -> int:
    """One case; the number of its failures."""
    where, log = cache() / "chroot" / "root", cache() / "chroot" / "log"  # in memory
    chroot = Chroot(where, suite)
    home = Path("/root" if user == "root" else "/srv/plain")
    chroot.mount(installed)
    run("chroot", where, "useradd", "--create-home", "--home-dir", "/srv/plain", "--uid", str(UID), "plain")
    here = where / home.relative_to("/") / "aiotransfer"
    here.mkdir()
    files = run("git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, here / name)
    chroot.network(home)
    if user == "root":
        shutil.copytree(here, where / "tmp/aiotransfer")
        run("chown", "-R", f"{UID}:{UID}", where / "tmp/aiotransfer")
        told = subprocess.run(chroot.command("plain", Path("/tmp"), "make hello"), capture_output=True, text=True)
        if told.returncode == 0 or "As root: apt-get install gcc" not in told.stderr:
            print(f"{suite}, a plain user of a bare machine: is not told what is missing\n{told.stdout}{told.stderr}", flush=True)
            return 1
    else:
        run("chown", "-R", f"{UID}:{UID}", where / home.relative_to("/"))
    downloads = cache() / f"pip-{user}"
    downloads.mkdir(exist_ok=True)
    os.chown(downloads, *((0, 0) if user == "root" else (UID, UID)))
    chroot.bind(downloads, home / ".cache" / "pip", "rw")
    if user != "root":
        os.chown(where / "srv/plain/.cache", UID, UID)
    begun_at = time.time()
    with open(log, "w") as told_to:
        for command, environ in steps(user, demo):
            begun = time.monotonic()
            words = chroot.command(user, home, command, **environ)
            try:
                done = subprocess.run(words, stdout=told_to, stderr=told_to, stdin=subprocess.DEVNULL, timeout=STEP_SECONDS)
                status = done.returncode
            except subprocess.TimeoutExpired:
                status = -1
            verdict = "ok" if status == 0 else f"FAILED ({status})"
            print(f"{suite}, {user}: {command[:60]:<60} {verdict} {time.monotonic() - begun:6.1f} s", flush=True)
            if status != 0:
                print(log.read_text()[-6000:], flush=True)
                return 1
    if date_of_python(where) >= begun_at:  # a package's files are older
        print(f"{suite}, {user}: the system's Python was touched", flush=True)
        return 1
    return 0


# ---- outside ----


def case(suite: str, user: str, demo: bool) -> int:
    """Run one case inside; the number of failures."""
    installed = base(suite, BARE if user == "root" else (*BARE, *README))
    (cache() / "chroot").mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--inside", str(installed), "--suite", suite, "--user", user]
    status = subprocess.run([*PRIVATE, *command, *([] if demo else ["--no-demo"])]).returncode
    if str(cache()) in Path("/proc/mounts").read_text():
        raise RuntimeError("something is still mounted")
    return int(status != 0)


def main() -> int:
    """Returns the number of cases that failed."""
    parser = argparse.ArgumentParser(description="the README's commands in fresh installations of Debian")
    parser.add_argument("--suite", action="append", choices=SUITES, help="default: all")
    parser.add_argument("--user", action="append", choices=USERS, help="default: all")
    parser.add_argument("--no-demo", action="store_true", help="without the libraries of the demo (200 MB and more)")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    suites, users = args.suite or SUITES, args.user or USERS
    if args.inside is not None:
        return inside(suites[0], users[0], not args.no_demo, args.inside)
    if os.geteuid() != 0:
        print("needs root, for chroots and mounts", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs inside is ended, too
    if shutil.which("debootstrap") is None:
        run("apt-get", "install", "-y", "-qq", "--no-install-recommends", "debootstrap", "debian-archive-keyring")
    cache().mkdir(parents=True, exist_ok=True)
    return sum(case(suite, user, not args.no_demo) for suite in suites for user in users)


if __name__ == "__main__":
    raise SystemExit(main())
