"""Ray's side: the classes that Ray asks for. The only file that imports Ray, and all that it uses of Ray is
used here.

Ray keeps one `AioTransport` in each process and calls it from several threads: from that of the task, from
one for transfers (`_ray_system`) and from one for aborts (`_ray_system_error`).
"""

from __future__ import annotations

import os
import threading
import weakref
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayDirectTransportError
from ray.experimental.rdt.tensor_transport_manager import (
    CommunicatorMetadata,
    FetchRequest,
    TensorTransportManager,
    TensorTransportMetadata,
)

from aiotransfer.errors import QuarantineError, TransferError, again, said
from aiotransfer.integrations.ray.exports import Offer
from aiotransfer.integrations.ray.node import ABORT_SECONDS, Node, Statistics
from aiotransfer.integrations.ray.parts import device_of, meta_of, part_of, size_of, tensor_of

BACKEND = "AIOTRANSFER"
SECONDS = 60.0  # that Ray lets a fetch take, where it does not say
SHARE = 0.9  # of that: the fetch ends first, so that its memory is free and the reader is told why


@dataclass
class AioMetadata(TensorTransportMetadata):  # type: ignore[misc]
    """What a reader is told of an object. `offer`: where its bytes are; None for an object without tensors.
    `node`: Ray's number of the machine that it is on."""

    offer: Offer | None = None
    node: str = ""


@dataclass
class AioCommunicator(CommunicatorMetadata):  # type: ignore[misc]
    """Nothing: an object's own metadata says where it is."""


class AioFetch(FetchRequest):  # type: ignore[misc]
    """A fetch under way. Dropping it ends it. `metadata`: of the object; `future`: of its bytes (None: it has
    no tensors); `into`: the tensors that were given for it."""

    def __init__(self, obj_id: str, metadata: AioMetadata, future: Future[list[Any]] | None, into: list[Any] | None) -> None:
        super().__init__(obj_id=obj_id, tensors=[])
        self.metadata = metadata
        self.future = future
        self.into = into

    def __del__(self) -> None:
        future = getattr(self, "future", None)
        if future is not None:
            future.cancel()


class AioTransport(TensorTransportManager):  # type: ignore[misc]
    """The tensor transport `aiotransfer`: one-sided reads from the memory of the process that has the object.

    Every method may be called from any thread.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._node: Node | None = None
        self._has_it: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

    def tensor_transport_backend(self) -> str:
        """The name by which Ray knows it; tasks may write it in small letters."""
        return BACKEND

    @staticmethod
    def is_one_sided() -> bool:
        """True: the process that has the object takes no part in a fetch."""
        return True

    @staticmethod
    def can_abort_transport() -> bool:
        """True: a fetch that fails or is aborted ends alone, and Ray kills no actor for it."""
        return True

    def node(self) -> Node:
        """The engine of this process, opened at the first call. Raises what `open_engine` raises."""
        with self._guard:
            if self._node is None or not self._node.usable:
                self._node = Node(listen_address(), _name(), fetch_seconds())
            return self._node

    def actor_has_tensor_transport(self, actor: Any) -> bool:
        """Whether `actor` can use it; asked for once, in the actor."""
        known = self._has_it.get(actor)
        if known is None:
            call = actor.__ray_call__.options(concurrency_group="_ray_system")
            known = self._has_it[actor] = bool(ray.get(call.remote(usable_here)))
        return known

    # ---- the process that has the object ----

    def extract_tensor_transport_metadata(self, obj_id: str, rdt_object: list[Any]) -> AioMetadata:
        """Register the memory of the tensors `rdt_object` of the object `obj_id`.

        Raises `TypeError` or `ValueError` for tensors that cannot be read as they lie, `RegistrationError`,
        or what opening an engine raises.
        """
        parts = [part_of(tensor) for tensor in rdt_object]
        offer = self.node().offer(obj_id, parts) if parts else None
        device = device_of(rdt_object[0]) if rdt_object else None
        return AioMetadata([meta_of(tensor) for tensor in rdt_object], device, offer, _machine())

    def garbage_collect(self, obj_id: str, tensor_transport_meta: AioMetadata, tensors: list[Any]) -> None:
        """Forget the object `obj_id`; the memory is released when nothing reads it. The other arguments are
        not needed (`tensor_transport_meta`, `tensors`)."""
        if self._node is not None and self._node.usable:
            self._node.withdraw(obj_id)

    def send_multiple_tensors(self, tensors: list[Any], tensor_transport_metadata: Any, communicator_metadata: Any) -> None:
        """Not called: see `is_one_sided`. Whatever is given (`tensors`, `tensor_transport_metadata`,
        `communicator_metadata`) is a `NotImplementedError`."""
        raise NotImplementedError("the reader moves the bytes: there is nothing to send")

    # ---- the process that wants it ----

    def get_communicator_metadata(self, src_actor: Any, dst_actor: Any, backend: str | None = None) -> AioCommunicator:
        """Nothing needs to be agreed on, for any `src_actor` and `dst_actor`, and whatever `backend`
        is."""
        return AioCommunicator()

    def fetch_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: AioMetadata,
        communicator_metadata: Any,
        target_buffers: list[Any] | None = None,
    ) -> AioFetch:
        """Begin to read all tensors of the object `obj_id`, and return at once.

        `tensor_transport_metadata` is what the owner said of it; `target_buffers`: contiguous tensors of the
        same sizes to read into (None: new ones are made). `communicator_metadata` is not needed. Raises
        `RayDirectTransportError`, or `ValueError` for buffers that do not fit.
        """
        metadata = tensor_transport_metadata
        into = None if target_buffers is None else _fitting(target_buffers, metadata)
        if metadata.offer is None:
            return AioFetch(obj_id, metadata, None, into)
        if [place.nbytes for place in metadata.offer.places] != [size_of(*one) for one in metadata.tensor_meta]:
            raise ValueError(f"object {obj_id}: the sizes that its owner gave are not those of its tensors")
        _check_reach(obj_id, metadata)
        try:
            return AioFetch(obj_id, metadata, self.node().fetch(obj_id, metadata.offer, into), into)
        except TransferError as error:
            raise _failure(obj_id, error) from again(error)

    def wait_fetch_complete(self, fetch_request: AioFetch, timeout: float = -1) -> list[Any]:
        """The tensors of a fetch that was begun by `fetch_multiple_tensors` (`fetch_request`).

        `timeout`: seconds; less than 0 (default): as long as a fetch may take. Raises
        `RayDirectTransportError` when it failed or was aborted, and `TimeoutError`. A `timeout` of 0 only
        looks, and the fetch goes on. One above 0 that passes ends the fetch: when the error is raised,
        nothing of it lands any more.
        """
        future, metadata = fetch_request.future, fetch_request.metadata
        if future is None:
            return [] if fetch_request.into is None else fetch_request.into
        try:
            done, _ = wait([future], None if timeout < 0 else timeout)
        except BaseException:  # Ctrl-C in the waiting thread
            future.cancel()
            raise
        if not done:
            if timeout > 0:
                _end(fetch_request.obj_id, future)
            raise TimeoutError(f"object {fetch_request.obj_id} did not come within {timeout:g} s")
        found = _result(fetch_request.obj_id, future)
        if fetch_request.into is not None:
            return fetch_request.into
        return [tensor_of(memory, *meta) for memory, meta in zip(found, metadata.tensor_meta, strict=True)]

    def recv_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: AioMetadata,
        communicator_metadata: Any,
        target_buffers: list[Any] | None = None,
    ) -> list[Any]:
        """Fetch the object `obj_id` and wait for it: `fetch_multiple_tensors` with the same arguments
        (`tensor_transport_metadata`, `communicator_metadata`, `target_buffers`), then
        `wait_fetch_complete`."""
        request = self.fetch_multiple_tensors(obj_id, tensor_transport_metadata, communicator_metadata, target_buffers)
        return self.wait_fetch_complete(request)

    def abort_transport(self, obj_id: str, communicator_metadata: Any) -> None:
        """End what is under way of the object `obj_id` in this process, and wait until nothing of it can
        land. The process at the other end notices nothing. `communicator_metadata` is not needed."""
        self.node().abort(obj_id)

    # ---- for users ----

    def statistics(self) -> Statistics:
        """What the transport of this process has done so far."""
        return self.node().statistics()

    def close(self) -> None:
        """Close the engine of this process; what others read from it ends in an error. The next use opens
        another one."""
        with self._guard:
            node, self._node = self._node, None
        if node is not None and node.usable:
            node.close()


def usable_here(actor: Any = None) -> bool:
    """Whether this process has what the transport needs. Ray calls it with the `actor` in whose process it
    runs."""
    from aiotransfer.providers import native

    return native.lib is not None


def fetch_seconds() -> float:
    """How long a fetch may take: a little less than Ray waits for it."""
    from ray._private import ray_constants

    return SHARE * float(getattr(ray_constants, "RDT_FETCH_FAIL_TIMEOUT_SECONDS", SECONDS))


def listen_address() -> str:
    """Where the engine of this process listens: where the other machines of the cluster reach this one if
    there is a key, else on loopback, since engines without a key accept processes of this host alone."""
    if "AIOTRANSFER_KEY" not in os.environ:
        return "127.0.0.1:0"
    host = str(ray.util.get_node_ip_address())
    return f"[{host}]:0" if ":" in host else f"{host}:0"


def _machine() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _name() -> str:
    actor = ray.get_runtime_context().get_actor_id()
    return f"ray actor {actor}" if actor else f"ray process {os.getpid()}"


def _fitting(buffers: list[Any], metadata: AioMetadata) -> list[Any]:
    """The memory that was given, if it is that of the tensors of the object."""
    sizes = [size_of(*one) for one in metadata.tensor_meta]
    given = [part_of(buffer).nbytes for buffer in buffers]
    if given != sizes:
        raise ValueError(f"the target buffers have {given} bytes, the tensors of the object {sizes}")
    return buffers


def _check_reach(obj_id: str, metadata: AioMetadata) -> None:
    offer = metadata.offer
    if offer is None or metadata.node == _machine() or not offer.address.startswith(("127.", "[::1]")):
        return
    raise RayDirectTransportError(
        f"object {obj_id} is on another machine, whose engine listens on loopback because it has no AIOTRANSFER_KEY: give all "
        'processes of the cluster one key, by runtime_env={"env_vars": {"AIOTRANSFER_KEY": ...}}'
    )


def _result(obj_id: str, future: Future[list[Any]]) -> list[Any]:
    try:
        return future.result()
    except TransferError as error:
        raise _failure(obj_id, error) from again(error)
    except CancelledError as error:
        raise _failure(obj_id, error) from None


def _end(obj_id: str, future: Future[list[Any]]) -> None:
    """End a fetch and wait until nothing of it lands. Raises `RayDirectTransportError` where that cannot be
    proved."""
    future.cancel()
    done, _ = wait([future], ABORT_SECONDS)
    if not done:
        raise RayDirectTransportError(f"the fetch of object {obj_id} by aiotransfer was cancelled, and has not ended")
    if not future.cancelled() and isinstance(error := future.exception(), QuarantineError):
        raise _failure(obj_id, error) from again(error)


def _failure(obj_id: str, error: BaseException) -> RayDirectTransportError:
    why = "it was aborted" if isinstance(error, CancelledError) else said(error)
    return RayDirectTransportError(f"the fetch of object {obj_id} by aiotransfer failed: {why}")
