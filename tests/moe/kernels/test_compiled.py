"""The kernels as they are compiled for a GPU. That needs none: Triton brings its assembler, and what comes out is looked at.

The calls are those of `TritonKernels`, down to a driver that says it is a GPU's, and loads and launches nothing. In a process of
its own: under TRITON_INTERPRET=1 nothing is compiled.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.needs import skip_interpreter

ROOT = Path(__file__).parents[3]
CAPABILITIES = (80, 90, 100)  # A100, H100, B200


@pytest.fixture(scope="module", params=CAPABILITIES)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """PTX of each kernel, and how many there were."""
    skip_interpreter()
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "tests.moe.kernels.test_compiled", str(request.param)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def accesses(ptx: str) -> Counter[str]:
    return Counter(re.findall(r"\b(?:ld|st)\.global\S*", ptx))


def test_aligned_rows_are_copied_in_words_of_16_bytes(compiled: dict[str, Any]) -> None:
    found = accesses(compiled["move wide"])
    assert found.keys() == {"ld.global.v4.b32", "st.global.v4.b32", "ld.global.b64"}  # and the row's number
    found = accesses(compiled["move wide with a tail"])
    assert found["ld.global.v4.b32"] == found["st.global.v4.b32"] == 8
    assert found["ld.global.b8"] == found["st.global.b8"] == 1


def test_other_rows_are_copied_byte_by_byte(compiled: dict[str, Any]) -> None:
    assert accesses(compiled["move narrow"]).keys() == {"ld.global.b8", "st.global.b8", "ld.global.b64"}


def test_products_and_sums_are_rounded_each(compiled: dict[str, Any]) -> None:
    for name, ptx in compiled.items():
        if name.startswith("weigh"):
            lanes: Counter[str] = Counter()
            for operation in re.findall(r"\b(?:fma|mad|mul|add)\.\S*f32\S*", ptx):
                lanes[operation.removesuffix("x2")] += 2 if operation.endswith("x2") else 1  # B200 makes two at once
            assert lanes == {"mul.rn.f32": 64, "add.rn.f32": 64}, name  # 8 choices, 8 columns a thread; none flushes to zero


def test_numbers_are_read_and_written_16_bytes_at_once(compiled: dict[str, Any]) -> None:
    assert {name for name in compiled if name.startswith("weigh")}
    for name, ptx in compiled.items():
        if name.startswith("weigh"):
            found = accesses(ptx)
            assert found["ld.global.v4.b32"] >= 8
            assert found["st.global.v4.b32"] >= 1
            assert found.keys() <= {"ld.global.v4.b32", "st.global.v4.b32", "ld.global.b64", "ld.global.b32"}, name


def test_the_word_is_counted_up_for_the_whole_system_to_see(compiled: dict[str, Any]) -> None:
    (found,) = re.findall(r"\b(?:atom|red)\.\S*", compiled["bump"])  # newer versions of Triton do not ask for the old value
    assert found.partition(".")[2] == "global.sys.release.add.u64"


def test_another_step_needs_no_other_kernel(compiled: dict[str, Any]) -> None:
    assert compiled["kernels after more steps"] == compiled["kernels"]


class NoGpu:
    """Triton's driver, as far as compiling goes."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)
        self.utils = self
        self.launcher_cls = lambda source, metadata: self.launch
        self.launched = 0

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 17}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        assert binary.startswith(b"\x7fELF")
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads

    def launch(self, *arguments: Any) -> None:
        self.launched += 1


def main(capability: int) -> dict[str, Any]:
    import torch
    import triton

    from aiotransfer.moe.kernels import Rows
    from aiotransfer.moe.kernels import gpu as ours
    from aiotransfer.moe.kernels.gpu_programs import bump_kernel, move_kernel, weigh_kernel

    driver = NoGpu(capability)
    triton.runtime.driver.set_active(driver)
    ours.INTERPRETED = True  # so that tensors of the host are taken
    kernels = ours.TritonKernels("cpu")
    made: dict[str, Any] = {}

    def known() -> list[Any]:
        return [each for kernel in (bump_kernel, move_kernel, weigh_kernel) for each in kernel.device_caches[0][0].values()]

    def add(name: str, call: Callable[..., None], *arguments: Any, **options: Any) -> None:
        before, launched = known(), driver.launched
        call(*arguments, **options)
        (new,) = (kernel for kernel in known() if all(kernel is not each for each in before))
        assert driver.launched == launched + 1
        made[name] = new.asm["ptx"]

    def rows(n: int, stride: int, nbytes: int) -> Rows:
        return Rows(torch.zeros(n * stride, dtype=torch.uint8), 0, stride, nbytes)

    def numbers(*shape: int) -> Any:
        return torch.zeros(shape, dtype=torch.int64)

    for name, stride, nbytes in (
        ("move wide", 16384, 16384), ("move wide with a tail", 16384, 16370), ("move narrow", 16377, 16377),
    ):  # fmt: skip
        add(name, kernels.move, rows(32, stride, nbytes), numbers(32), rows(40, stride, nbytes), None, 32)
    for of, to in (("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float32"), ("bfloat16", "float32")):
        size, space = (4096 * (4 if name == "float32" else 2) for name in (of, to))
        sums, results = rows(48, space, space), rows(400, size, size)
        given = sums, results, numbers(48, 8), torch.zeros((48, 8))
        add(f"weigh {of} to {to}", kernels.weigh, *given, dtype=of, out_dtype=to)
    add("bump", kernels.bump, kernels.word())

    made["kernels"] = len(known())
    for n, more in ((1, 0), (7, 9), (16, 16), (33, 1)):  # Triton looks for multiples of 16 and for 1
        kernels.move(rows(n + more, 16384, 16384), numbers(n), rows(n, 16384, 16384), None, n)
        sums, results = rows(n, 8192, 8192), rows(n + more, 8192, 8192)
        kernels.weigh(sums, results, numbers(n, 8), torch.zeros((n, 8)), dtype="bfloat16", out_dtype="bfloat16")
    made["kernels after more steps"] = len(known())
    return made


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
