"""What keeps registered memory where it is, for as long as it is registered.

An object that was registered may later be made to point to other memory: `parameter.data = ...`,
`tensor.set_(...)`. A reference to the object alone then keeps the wrong memory alive. So the storage is kept
as well, and what stops its owner from freeing it or moving it:

- a buffer (`bytearray`, `array`, `mmap`) by an export, which makes its owner refuse to change its size;
- a NumPy array by a weak reference, which makes `resize(refcheck=False)` refuse, and so for each array that it is a view of;
- a storage of torch by a NumPy view, after which torch refuses to resize it (for good: torch has no way back), and by methods of
  its own in the place of those that would move it into shared memory (`share_memory_`, sending it to another process).
"""

from __future__ import annotations

import array
import sys
import weakref
from typing import Any, NamedTuple

import numpy as np

HEAP = (bytes, bytearray, array.array)  # their memory is never a mapping of a file


class Held(NamedTuple):
    """References that keep memory alive and in place; `heap`: it is surely from the heap, so that no page can
    be taken away."""

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
            held.append(_unshared(owner))
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


_MOVES = ("_share_fd_cpu_", "_share_filename_cpu_")
_STAYS = "_aiotransfer_stays"


class _Stays:
    """A token: while it lives, its storage is not moved into shared memory."""

    __slots__ = ("__weakref__",)


def _refuse_to_share(*_: object, **__: object) -> None:
    raise RuntimeError("this storage is registered with aiotransfer and stays where it is: call share_memory_() before that")


def _unshared(storage: Any) -> object:
    if storage.device.type != "cpu" or storage.is_shared():
        return None
    known = storage.__dict__.get(_STAYS)
    stays = known() if known is not None else None
    if stays is None:
        stays = _Stays()
        setattr(storage, _STAYS, weakref.ref(stays))
        for name in _MOVES:
            setattr(storage, name, _refuse_to_share)
        weakref.finalize(stays, _may_move, storage).atexit = False
    return stays


def _may_move(storage: Any) -> None:
    for name in (*_MOVES, _STAYS):
        storage.__dict__.pop(name, None)
