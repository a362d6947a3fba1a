"""Element types: a name comes back as the same type, and what is no plain number is a `TypeError`, whatever it is."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotransfer.model.dtypes import lookup

PLAIN = ["bool", *(f"{s}int{n}" for s in ("", "u") for n in (8, 16, 32, 64)), "float16", "float32", "float64", "complex64"]


@pytest.mark.parametrize("name", [*PLAIN, "bfloat16", "float8_e4m3fn", "float8_e5m2", "datetime64[ns]"])
def test_a_type_is_found_again_by_its_name(name: str) -> None:
    found = lookup(name)
    assert found.name == name
    assert lookup(found.name) == lookup(f"torch.{name}") == found
    assert found.numpy is None or lookup(found.numpy) == found
    assert found.numpy is None or found.itemsize == found.numpy.itemsize


def test_names_mean_what_their_library_means_by_them() -> None:
    for name in ("float", "double", "half", "short", "int8", "single"):
        assert lookup(name).numpy == np.dtype(name)
    assert [lookup(f"torch.{n}").name for n in ("float", "double", "half", "long")] == ["float32", "float64", "float16", "int64"]


@pytest.mark.parametrize(
    "bad", ["S5", "U4", "V8", "f4,f4", "(2,)f4", [("x", "i4")], "O", object, "", "(1,2", "9" * 13 + "i4", {}]
)
def test_what_is_no_plain_number_is_refused(bad: Any) -> None:
    with pytest.raises(TypeError):
        lookup(bad)


@pytest.mark.parametrize("swapped", [">i4", ">f8", np.dtype(">u2")])
def test_a_foreign_byte_order_is_refused_and_not_quietly_dropped(swapped: Any) -> None:
    with pytest.raises(TypeError, match="byte order"):
        lookup(swapped)


@given(
    st.one_of(st.text(max_size=12), st.text("0123456789(),<>=|fiubcSUVOMm[] ", max_size=12), st.binary(max_size=6), st.integers())
)
def test_anything_is_a_type_or_a_type_error(dtype: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's own, about its old aliases
        try:
            found = lookup(dtype)
        except TypeError:
            return
        assert found.itemsize > 0
        assert lookup(found.name) == found
