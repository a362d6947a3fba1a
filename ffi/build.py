"""Builds the one native extension, `aiotransfer._native`.

Three users: hatchling calls the hook when a wheel or an editable install is made; `python ffi/build.py` rebuilds in place while
working on the C; both call `build`. `python ffi/build.py --strict FILE...` compiles our own C and the files named with every
warning an error and keeps nothing: `make lint` does this. An installation never does, because the compilers and the headers of
other machines have warnings that we have not seen. Our own C is compiled first; the wrapper that cffi generates is compiled
afterwards without our flags and linked with our objects. The same `decls.h` files feed cffi and the compiler. `CC`, `CFLAGS`,
`CPPFLAGS` and `LDFLAGS` are honoured.

Without a compiler or Python's headers the installation fails and says what to install: pip would otherwise cache a wheel that
moves no bytes and install it again and again. `AIOTRANSFER_SKIP_NATIVE=1` installs without the extension on purpose; then the
reason is recorded (`_build_facts.json`), and `open_engine` and `doctor` tell it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PACKAGE = ROOT / "aiotransfer"
FACTS = PACKAGE / "_build_facts.json"
EVERYWHERE = ("lane", "sim", "rows")
FOLDERS = (*EVERYWHERE, "fabric", "ofi", "simrail", "verbs", "shm", "bench") if sys.platform.startswith("linux") else EVERYWHERE
WARNINGS = ["-Wall", "-Wextra", "-Wconversion"]
# What the code relies on stands after the flags of the user. A product and a sum that one processor fuses and another does not
# would give other bits (ffi/rows), and so would arithmetic without infinities.
NEEDED = ["-std=gnu11", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-fast-math", "-ffp-contract=off"]
AGAIN = "`pip install --no-cache-dir --force-reinstall aiotransfer`"


def version() -> str:
    """The package's version, also compiled into the extension."""
    match = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    if match is None:
        raise SystemExit("pyproject.toml names no version")
    return match[1]


def declarations() -> str:
    """What cffi reads."""
    files = [HERE / folder / "decls.h" for folder in FOLDERS]
    return "\n".join(f.read_text() for f in files if f.exists())


def sources() -> list[Path]:
    """Our own C."""
    return [f for folder in FOLDERS for f in sorted((HERE / folder).glob("*.c"))]


def of_the_user() -> list[str]:
    """The flags for the compiler that the environment has."""
    return [flag for name in ("CPPFLAGS", "CFLAGS") for flag in shlex.split(os.environ.get(name, ""))]


def compile_own(work: Path, compiler: list[str], extra: list[str], sources: list[Path]) -> list[str]:
    """The objects of these sources; raises `SystemExit` with the compiler's words when one does not compile."""

    def compiled(source: Path) -> str:
        target = work / f"{source.parent.name}_{source.stem}.o"
        flags = ["-O3", *WARNINGS, *of_the_user(), *NEEDED, f'-DAT_VERSION="{version()}"', f"-I{HERE}", *extra]
        done = subprocess.run([*compiler, *flags, "-c", str(source), "-o", str(target)], capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{source} does not compile:\n{done.stderr}")
        print(done.stderr, end="", file=sys.stderr)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, sources))


def find_compiler() -> list[str]:
    """The command of the C compiler; raises `SystemExit` with what to install when that or Python's headers are missing."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    missing = []
    if shutil.which(compiler[0]) is None:
        missing.append(f"a C compiler ({compiler[0]!r})")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        missing.append(f"the headers of Python {sys.version_info.major}.{sys.version_info.minor} (Python.h)")
    if missing:
        raise SystemExit(refusal(f"{' and '.join(missing)} not found"))
    return compiler


def refusal(why: str) -> str:
    """Why there can be no extension, and what to do."""
    return (
        f"aiotransfer cannot be built: {why}. Install what is missing (Debian and Ubuntu: apt-get install gcc libc6-dev "
        f"python3-dev), then {AGAIN}. AIOTRANSFER_SKIP_NATIVE=1 installs without the native extension; no engine can be "
        "opened then."
    )


def try_compiler(compiler: list[str]) -> None:
    """Raises `SystemExit` when the compiler is there but makes nothing: `CC` names another program, the C library is missing."""
    with tempfile.TemporaryDirectory() as work:
        source, target = Path(work, "works.c"), Path(work, "works.so")
        source.write_text("#include <stdio.h>\n#include <Python.h>\nint works(void) { return EOF; }\n")
        flags = ["-fPIC", f"-I{sysconfig.get_paths()['include']}", *of_the_user()]
        done = subprocess.run([*compiler, *flags, "-shared", str(source), "-o", str(target)], capture_output=True, text=True)
        if done.returncode != 0 or not target.exists():
            said = done.stderr.strip() or f"it ended with {done.returncode} and said nothing"
            raise SystemExit(refusal(f"the C compiler ({shlex.join(compiler)}) cannot compile three lines: {said}"))


def strict(others: list[str]) -> None:
    """Compile our own C and `others`, every warning an error; nothing is kept."""
    with tempfile.TemporaryDirectory() as work:
        compile_own(Path(work), find_compiler(), ["-Werror"], [*sources(), *(Path(name).resolve() for name in others)])


def build() -> Path | None:
    """Build in place; the extension's file, or None where `AIOTRANSFER_SKIP_NATIVE=1` says so."""
    if os.environ.get("AIOTRANSFER_SKIP_NATIVE") == "1":
        return record("AIOTRANSFER_SKIP_NATIVE=1 was set when aiotransfer was installed")
    compiler = find_compiler()
    try_compiler(compiler)
    import cffi
    from setuptools import Distribution
    from setuptools.command.build_ext import build_ext

    work = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.version_info.major}.{sys.version_info.minor}"
    work.mkdir(parents=True, exist_ok=True)
    sanitize = os.environ.get("AIOTRANSFER_SANITIZE")
    extra = [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-g", "-O1"] if sanitize else []
    if sanitize == "thread":
        extra.append("-Wno-tsan")  # the fence of a reader (ffi/shm/post.c) stays, it only tells the sanitizer nothing
    ffi = cffi.FFI()
    ffi.cdef(declarations())
    ffi.set_source(
        "aiotransfer._native",
        '#include "native.h"',
        extra_objects=compile_own(work, compiler, extra, sources()),
        include_dirs=[str(HERE)],
        extra_compile_args=["-O2", "-pthread", *extra],
        extra_link_args=["-pthread", "-ldl", *extra],
    )
    extension: Any = ffi.distutils_extension(str(work), verbose=False)
    extension.py_limited_api = False
    command: Any = build_ext(Distribution({"name": "aiotransfer", "ext_modules": [extension]}))
    command.build_lib, command.build_temp, command.force = str(work / "lib"), str(work), True
    command.ensure_finalized()
    command.run()
    (built,) = (Path(f) for f in command.get_outputs())
    target = PACKAGE / built.name
    temporary = target.with_suffix(".new")
    shutil.copy2(built, temporary)
    temporary.replace(target)  # a process that has the old one mapped keeps it
    FACTS.write_text(json.dumps({"built": True, "version": version(), "sanitize": sanitize or ""}))
    return target


def record(reason: str) -> None:
    """Remember why there is no extension."""
    FACTS.write_text(json.dumps({"built": False, "reason": reason}))
    print(f"aiotransfer: installing without the native extension: {reason}", file=sys.stderr)


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand
    pass
else:

    class NativeHook(BuildHookInterface[Any]):
        """Puts the extension into wheels and editable installs."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            """Called by hatchling before it collects files."""
            if self.target_name != "wheel":
                return
            target = build()
            build_data["artifacts"] += ["aiotransfer/_build_facts.json"]
            if target is not None:
                build_data["artifacts"].append(f"aiotransfer/{target.name}")
                build_data["pure_python"] = False
                build_data["infer_tag"] = True


if __name__ == "__main__":
    if sys.argv[1:2] == ["--strict"]:
        strict(sys.argv[2:])
    else:
        print(build())
