"""The kernels as they are compiled for a GPU, which needs none: as for those of MoE."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.moe.kernels.test_compiled import CAPABILITIES, NoGpu, accesses
from tests.needs import skip_interpreter

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", params=CAPABILITIES)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """PTX of each kernel, and how many there were."""
    skip_interpreter()
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "tests.weights.kernels.test_compiled", str(request.param)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_numbers_are_divided_and_added_as_the_host_does_it(compiled: dict[str, Any]) -> None:
    for name, ptx in compiled.items():
        if name.startswith("quantise"):
            assert set(re.findall(r"\bdiv\.\S*f32\S*", ptx)) == {"div.rn.f32"}, name
            assert not re.findall(r"\b(?:fma|mul)\.\S*f32\S*|\brcp\.|\.ftz\b", ptx), name
            assert not re.findall(r"\bcvt\.\S*e4m3\S*", ptx), name


def test_the_first_place_that_is_not_finite_is_kept(compiled: dict[str, Any]) -> None:
    for name, ptx in compiled.items():
        if name.startswith("quantise"):
            assert re.findall(r"\b(?:atom|red)\.\S*min\.s64", ptx), name


def test_numbers_are_read_and_written_in_words(compiled: dict[str, Any]) -> None:
    for name, ptx in compiled.items():
        if name.startswith("cast") and not name.endswith("odd"):
            assert accesses(ptx).keys() == {"ld.global.v4.b32", "st.global.v4.b32"}, name
        elif name.startswith("quantise") and not name.endswith("odd"):
            assert accesses(ptx)["ld.global.v4.b32"], name
            assert not accesses(ptx).keys() & {"ld.global.b16", "ld.global.b8", "st.global.b8"}, name


def test_another_matrix_needs_no_other_kernel(compiled: dict[str, Any]) -> None:
    assert compiled["kernels after more matrices"] == compiled["kernels"]


def main(capability: int) -> dict[str, Any]:
    import torch
    import triton

    from aiotransfer.weights.kernels import gpu as ours
    from aiotransfer.weights.kernels.gpu_programs import cast_kernel, quantise_kernel

    driver = NoGpu(capability)
    triton.runtime.driver.set_active(driver)
    kernels = ours.TritonKernels.__new__(ours.TritonKernels)
    kernels._launches, kernels._launched = ours.Launches("cpu", interpreted=True), []  # so that tensors of the host are taken
    made: dict[str, Any] = {}

    def known() -> list[Any]:
        return [each for kernel in (cast_kernel, quantise_kernel) for each in kernel.device_caches[0][0].values()]

    def add(name: str, call: Callable[..., None], *arguments: Any) -> None:
        before, launched = known(), driver.launched
        call(*arguments)
        (new,) = (kernel for kernel in known() if all(kernel is not each for each in before))
        assert driver.launched == launched + 1
        made[name] = new.asm["ptx"]

    def matrix(rows: int, columns: int, dtype: str, wide: int = 0) -> Any:
        return torch.zeros(rows, wide or columns, dtype=getattr(torch, dtype))[:, :columns]

    def quantised(rows: int, columns: int, dtype: str, wide: int = 0) -> tuple[Any, ...]:
        scales = matrix(-(-rows // 128), -(-columns // 128), "float32")
        return matrix(rows, columns, "float8_e4m3fn", wide), scales, matrix(rows, columns, dtype, wide)

    for of, to in (("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16"), ("float32", "float16")):
        add(f"cast {of} to {to}", kernels.cast, matrix(32, 2048, to, 4096), matrix(32, 2048, of, 4096))
    add("cast odd", kernels.cast, matrix(33, 2047, "bfloat16", 4097), matrix(33, 2047, "float32", 4097))
    for dtype in ("bfloat16", "float32", "float16"):
        add(f"quantise {dtype}", kernels.quantise, *quantised(512, 2048, dtype))
    add("quantise odd", kernels.quantise, *quantised(333, 2047, "bfloat16", 2051))

    made["kernels"] = len(known())
    for rows, columns in ((512, 4096), (1024, 2048), (256, 7168)):  # Triton looks for multiples of 16 and for 1
        kernels.quantise(*quantised(rows, columns, "bfloat16"))
        kernels.cast(matrix(rows, columns, "bfloat16", 8192), matrix(rows, columns, "float32", 8192))
    made["kernels after more matrices"] = len(known())
    return made


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
