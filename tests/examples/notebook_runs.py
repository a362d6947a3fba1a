"""Runs the notebook as test_notebook wants it, in a process of its own: `python notebook_runs.py NOTEBOOK WAY`.

It exits with CANNOT_INTERRUPT, and says so, where Jupyter's own kernel does not end a waiting cell when it is
interrupted: there nothing could be learnt about ours.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat.v4 import new_code_cell, new_notebook

CANNOT_INTERRUPT = 77
PLAIN = """import asyncio
print("begun", flush=True)
await asyncio.sleep(3600)"""
FOREVER = """print("begun", flush=True)
await arrived.wait(1_000_000)"""
LARGE = """huge, place = engine.allocate(1 << 28), other.allocate(1 << 28)
print("begun", flush=True)
while True:
    await engine.write(huge, place.descriptor)"""
CHECK = """before = arrived.total
await engine.write(src[:4096], dst[:4096], imm=7)
await arrived.wait(1)
assert arrived.total == before + 1
assert engine.statistics().pending_operations == 0"""


async def interrupted(client: Any, book: Any, source: str, within: float = 30) -> None:
    """Run a cell that does not end, interrupt it, and see that it ended as an interrupted one does.

    Not before it has begun: a kernel that is interrupted while it is not yet in the cell ends.
    """
    cell = new_code_cell(source)
    book.cells.append(cell)
    running = asyncio.ensure_future(client.async_execute_cell(cell, len(book.cells) - 1))
    while not any("begun" in output.get("text", "") for output in cell.outputs):
        assert not running.done()
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.3)
    assert not running.done()
    await client.km.interrupt_kernel()
    with pytest.raises(CellExecutionError) as caught:
        await asyncio.wait_for(running, within)
    assert caught.value.ename in ("KeyboardInterrupt", "CancelledError"), caught.value


async def can_interrupt() -> bool:
    """Whether a kernel without aiotransfer ends a cell that sleeps when it is interrupted."""
    book = new_notebook()
    client = NotebookClient(book, timeout=60, kernel_name="python3")
    async with client.async_setup_kernel():
        try:
            await interrupted(client, book, PLAIN, within=10)
        except (TimeoutError, DeadKernelError):
            return False
    return True


async def main(path: str, way: str) -> None:
    if way == "interrupted" and not await can_interrupt():
        print("this machine's Jupyter kernel does not end a plain sleeping cell when it is interrupted")
        sys.exit(CANNOT_INTERRUPT)
    book = nbformat.read(path, as_version=4)
    client = NotebookClient(book, timeout=60, kernel_name="python3")
    cells = [i for i, cell in enumerate(book.cells) if cell.cell_type == "code"]
    async with client.async_setup_kernel():

        async def run(*which: int) -> None:
            for i in which:
                await client.async_execute_cell(book.cells[i], i)

        if way == "once":
            await run(*cells)
            outputs = [output for i in cells for output in book.cells[i].outputs]
            assert any("image/png" in output.get("data", {}) for output in outputs), "the plot"
            texts = [output.get("text", "") + str(output.get("data", {}).get("text/plain", "")) for output in outputs]
            assert any("100%" in text or "100 %" in text for text in texts), "the progress bar"
            if "first_steps" in path:
                assert any("<table" in output.get("data", {}).get("text/html", "") for output in outputs), "the engine as a table"
        elif way == "again":
            for i in cells[:-1]:
                await run(i, i)
            await run(*cells[:4], *cells[1:4], cells[-1], cells[-1], *cells)
        else:
            await run(*cells[:3])
            for source in (FOREVER, LARGE):
                await interrupted(client, book, source)
                book.cells.append(new_code_cell(CHECK))
                await run(len(book.cells) - 1)
            await run(*cells)


asyncio.run(main(sys.argv[1], sys.argv[2]))
