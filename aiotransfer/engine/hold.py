"""What keeps registered memory where it is, for as long as it is registered.

An object that was registered may later be made to point to other memory: `parameter.data = ...`, `tensor.set_(...)`. A reference
to the object alone then keeps the wrong memory alive. So the storage is kept as well, and what stops its owner from freeing it or
moving it:

- a buffer (`bytearray`, `array`, `mmap`) by an export, which makes its owner refuse to change its size;
- a NumPy array by a weak reference, which makes `resize(refcheck=False)` refuse, and so for each array that it is a view of;
- a storage of torch by a NumPy view, after which torch refuses to resize it (for good: torch has no way back).
"""

from __future__ import annotations

import array
import sys
import weakref
from typing import Any, NamedTuple

import numpy as np

HEAP = (bytes, bytearray, array.array)  # their memory is never a mapping of a file


class Held(NamedTuple):
    """References that keep memory alive and in place; `heap`: it is surely from the heap, so that no page can be taken away."""

    references: tuple[object, ...]
    heap: bool


def hold(owner: object) -> Held:
    """What keeps the memory of `owner`, and of everything that it is a view of."""
    held: list[object] = []
    heap = False
    torch = sys.modules.get("torch")
    while owner is not None:
        held.append(owner)
        if isinstance(owner, np.ndarray):
            held.append(weakref.ref(owner))
            heap = owner.flags.owndata
            owner = owner.base
        elif isinstance(owner, memoryview):
            owner = owner.obj
        elif torch is not None and isinstance(owner, torch.Tensor):
            owner = owner.untyped_storage()
        elif torch is not None and isinstance(owner, torch.UntypedStorage):
            heap = owner.resizable() and not owner.is_shared()
            held.append(_view_of(owner, torch))
            break
        else:
            heap = type(owner) in HEAP
            break
    return Held(tuple(held), heap)


def _view_of(storage: Any, torch: Any) -> object:
    """A NumPy view of all of a storage in host memory. torch refuses to resize what has one."""
    if storage.device.type != "cpu" or not storage.nbytes() or not storage.resizable():
        return None
    return torch.tensor((), dtype=torch.uint8, device="cpu").set_(storage).numpy()
