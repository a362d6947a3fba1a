"""The kernels as they are compiled for a GPU. That needs none: Triton brings its assembler, and what comes out is looked at.

In a process of its own: under TRITON_INTERPRET=1 nothing is compiled.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.moe.kernels.reference import skip_interpreter

ROOT = Path(__file__).parents[3]
CAPABILITIES = (80, 90, 100)  # A100, H100, B200


@pytest.fixture(scope="module", params=CAPABILITIES)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """PTX of each kernel."""
    skip_interpreter()
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "tests.moe.kernels.test_compiled", str(request.param)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def accesses(ptx: str) -> Counter[str]:
    return Counter(re.findall(r"\b(?:ld|st)\.global\S*", ptx))


def test_aligned_rows_are_copied_in_words_of_16_bytes(compiled: dict[str, str]) -> None:
    found = accesses(compiled["move wide"])
    assert found.keys() == {"ld.global.v4.b32", "st.global.v4.b32", "ld.global.b64"}  # and the row's number
    found = accesses(compiled["move wide with a tail"])
    assert found["ld.global.v4.b32"] == found["st.global.v4.b32"] == 8
    assert found["ld.global.b8"] == found["st.global.b8"] == 1


def test_other_rows_are_copied_byte_by_byte(compiled: dict[str, str]) -> None:
    assert accesses(compiled["move narrow"]).keys() == {"ld.global.b8", "st.global.b8", "ld.global.b64"}


def test_products_and_sums_are_rounded_each(compiled: dict[str, str]) -> None:
    for name, ptx in compiled.items():
        if name.startswith("weigh"):
            lanes: Counter[str] = Counter()
            for operation in re.findall(r"\b(?:fma|mad|mul|add)\.\S*f32\S*", ptx):
                lanes[operation.removesuffix("x2")] += 2 if operation.endswith("x2") else 1  # B200 makes two at once
            assert lanes == {"mul.rn.f32": 64, "add.rn.f32": 64}, name  # 8 choices, 8 columns a thread; none flushes to zero


def test_numbers_are_read_and_written_16_bytes_at_once(compiled: dict[str, str]) -> None:
    assert {name for name in compiled if name.startswith("weigh")}
    for name, ptx in compiled.items():
        if name.startswith("weigh"):
            found = accesses(ptx)
            assert found["ld.global.v4.b32"] >= 8
            assert found["st.global.v4.b32"] >= 1
            assert found.keys() <= {"ld.global.v4.b32", "st.global.v4.b32", "ld.global.b64", "ld.global.b32"}, name


def test_the_word_is_counted_up_for_the_whole_system_to_see(compiled: dict[str, str]) -> None:
    assert re.findall(r"\b(?:atom|red)\S*", compiled["bump"]) == ["atom.global.sys.release.add.u64"]


def main(capability: int) -> dict[str, str]:
    from triton import compile as build  # type: ignore[import-not-found, unused-ignore]
    from triton.backends.compiler import GPUTarget  # type: ignore[import-not-found, unused-ignore]
    from triton.compiler import ASTSource  # type: ignore[import-not-found, unused-ignore]

    from aiotransfer.moe.kernels.programs import bump_kernel, move_kernel, weigh_kernel

    def ptx(kernel: Any, types: dict[str, str], constants: dict[str, Any], aligned: str, **options: Any) -> str:
        names = kernel.arg_names
        signature = {name: types.get(name, "constexpr") for name in names}
        values = {(names.index(name),): value for name, value in constants.items()}
        multiples = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned.split()}
        target = GPUTarget("cuda", capability, 32)
        done = build(ASTSource(kernel, signature, values, multiples), target=target, options=options)
        assert done.asm["cubin"]
        return str(done.asm["ptx"])

    move = {"dst": "*u8", "src": "*u8", "dst_rows": "*i64"} | dict.fromkeys(
        ("dst_stride", "src_stride", "dst_end", "src_end", "nbytes"), "i32"
    )
    made = {
        name: ptx(move_kernel, move, {"src_rows": None, "WIDE": wide, "TAIL": tail, "BLOCK": 4096}, "dst src dst_rows")
        for name, wide, tail in (
            ("move wide", True, False), ("move wide with a tail", True, True), ("move narrow", False, True),
        )
    }  # fmt: skip
    sources = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*i16"}
    results = {"float32": "*i32", "float16": "*i16", "bfloat16": "*i16"}
    for of, to in (("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float32"), ("bfloat16", "float32")):
        weigh = {"out": results[to], "src": sources[of], "index": "*i64", "weights": "*fp32"}
        weigh |= dict.fromkeys(("out_stride", "src_stride", "src_end", "columns"), "i32")
        constants = {"CHOICES": 8, "OUT": to, "SRC": of, "BLOCK": 1024}
        aligned = "out src index weights out_stride src_stride columns"
        made[f"weigh {of} to {to}"] = ptx(weigh_kernel, weigh, constants, aligned, enable_fp_fusion=False)
    made["bump"] = ptx(bump_kernel, {"word": "*i64"}, {}, "word", num_warps=1)
    return made


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
