"""What keeps registered memory where it is, for as long as it is registered.

An object that was registered may later be made to point to other memory: `parameter.data = ...`, `tensor.set_(...)`. A reference
to the object alone then keeps the wrong memory alive. So the storage is kept as well, and what stops its owner from freeing it or
moving it:

- a buffer (`bytearray`, `array`, `mmap`) by an export, which makes its owner refuse to change its size;
- a NumPy array by a weak reference, which makes `resize(refcheck=False)` refuse, and so for each array that it is a view of;
- a storage of torch by a NumPy view, after which torch refuses to resize it (for good: torch has no way back).
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import numpy as np


def hold(owner: object) -> tuple[object, ...]:
    """References that keep the memory of `owner` alive and in place, and that of everything it is a view of."""
    held: list[object] = []
    torch = sys.modules.get("torch")
    while owner is not None:
        held.append(owner)
        if isinstance(owner, np.ndarray):
            held.append(weakref.ref(owner))
            owner = owner.base
        elif isinstance(owner, memoryview):
            owner = owner.obj
        elif torch is not None and isinstance(owner, torch.Tensor):
            owner = owner.untyped_storage()
        elif torch is not None and isinstance(owner, torch.UntypedStorage):
            held.append(_view_of(owner, torch))
            break
        else:
            break
    return tuple(held)


def _view_of(storage: Any, torch: Any) -> object:
    """A NumPy view of all of a storage in host memory. torch refuses to resize what has one."""
    if storage.device.type != "cpu" or not storage.nbytes() or not storage.resizable():
        return None
    return torch.tensor((), dtype=torch.uint8, device="cpu").set_(storage).numpy()
