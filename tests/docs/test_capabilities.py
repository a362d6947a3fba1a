"""The table of capabilities is what the code says."""

from __future__ import annotations

import pytest

from aiotransfer.providers import native
from aiotransfer.providers.selection.availability import KNOWN


@pytest.mark.skipif(not (native.has_fabric and native.has_verbs), reason="built without the headers of libfabric or libibverbs")
def test_the_page_has_the_table_that_the_code_makes() -> None:
    from tests.docs import capabilities

    assert set(capabilities.columns()) == set(KNOWN)
    assert capabilities.written() == capabilities.table(), "python -m tests.docs.capabilities writes it anew"
