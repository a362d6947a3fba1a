"""Names of element types, as torch and serving engines spell them."""

from __future__ import annotations

import pytest

from aiotransfer.kv import KVLayout, LayoutMismatch, plan_transfer
from aiotransfer.kv.protocol.elements import element


def layout(dtype: str, head_dim: int = 64) -> KVLayout:
    return KVLayout(layers=1, kv_heads=1, head_dim=head_dim, dtype=dtype, page_tokens=4, num_pages=4)


@pytest.mark.parametrize(
    ("name", "known", "bits"),
    [
        ("fp8", "float8_e4m3fn", 8), ("fp8_e4m3", "float8_e4m3fn", 8), ("float8_e4m3fn", "float8_e4m3fn", 8),
        ("torch.float8_e4m3fn", "float8_e4m3fn", 8), ("fp8_e5m2", "float8_e5m2", 8),
        ("bf16", "bfloat16", 16), ("half", "float16", 16),
        ("uint8", "uint8", 8), ("int4", "int4", 4), ("fp4", "float4_e2m1fn", 4), ("nvfp4", "nvfp4", 4),
        ("torch.float4_e2m1fn_x2", "float4_e2m1fn_x2", 8),
    ],
)  # fmt: skip
def test_one_type_has_one_name(name: str, known: str, bits: int) -> None:
    assert element(name) == (known, bits)
    assert layout(name).dtype == known
    assert layout(name).vector_bytes == 8 * bits


def test_two_spellings_of_one_type_match_and_two_types_do_not() -> None:
    assert plan_transfer(layout("fp8"), layout("float8_e4m3fn")).nbytes(16) == 2 * 16 * 64
    assert plan_transfer(layout("int4"), layout("int4")).nbytes(16) == 2 * 16 * 32
    for other in ("fp8_e5m2", "float8_e4m3fnuz", "uint8"):
        with pytest.raises(LayoutMismatch, match="dtype"):
            plan_transfer(layout("fp8"), layout(other))


def test_half_a_byte_is_no_vector() -> None:
    with pytest.raises(ValueError, match="head_dim: 3 elements of int4 are no whole bytes"):
        layout("int4", 3)


@pytest.mark.parametrize("name", ["fp7", "x" * 65, "object", ""])
def test_what_is_no_type_is_refused(name: str) -> None:
    with pytest.raises(TypeError):
        layout(name)
