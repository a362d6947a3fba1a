"""Builds the one native extension, `aiotransfer._native`.

Three users: hatchling calls the hook when a wheel or an editable install is made; `python ffi/build.py` rebuilds in place while
working on the C; both call `build`. Our own C is compiled first, with every warning an error; the wrapper that cffi generates is
compiled afterwards without those flags and linked with our objects. The same `decls.h` files feed cffi and the compiler.

A machine without a compiler is a recorded fact (`_build_facts.json`, told by `open_engine` and `doctor`), never an import error;
our own C failing to compile is always an error.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PACKAGE = ROOT / "aiotransfer"
FACTS = PACKAGE / "_build_facts.json"
EVERYWHERE = ("lane", "sim", "rows")
FOLDERS = (*EVERYWHERE, "fabric", "wire", "verbs", "shm", "bench") if sys.platform.startswith("linux") else EVERYWHERE
STRICT = ["-std=gnu11", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
STRICT.append("-ffp-contract=off")  # a product and a sum that one processor fuses and another does not give other bits (ffi/rows)


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


def compile_own(work: Path, compiler: list[str], extra: list[str]) -> list[str]:
    """Our objects; raises `SystemExit` with the compiler's words when one does not compile."""
    objects = []
    for source in sources():
        target = work / f"{source.parent.name}_{source.stem}.o"
        flags = [*STRICT, f'-DAT_VERSION="{version()}"', f"-I{HERE}", *extra]
        done = subprocess.run([*compiler, *flags, "-c", str(source), "-o", str(target)], capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{source} does not compile:\n{done.stderr}")
        objects.append(str(target))
    return objects


def build() -> Path | None:
    """Build in place; the extension's file, or None where that is impossible."""
    if os.environ.get("AIOTRANSFER_SKIP_NATIVE") == "1":
        return record("AIOTRANSFER_SKIP_NATIVE=1 was set when aiotransfer was installed")
    compiler = (os.environ.get("CC") or "cc").split()
    if shutil.which(compiler[0]) is None:
        return record(f"no C compiler ({compiler[0]!r}) was found when aiotransfer was installed")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return record("the headers of Python (python3-dev) were missing when aiotransfer was installed")
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
        extra_objects=compile_own(work, compiler, extra),
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
    print(build())
