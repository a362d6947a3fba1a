"""What Ray asks of a tensor transport, asked as Ray asks it: with a stub in Ray's place. `make test-ray` has real actors."""

from __future__ import annotations

import gc
import importlib
import pickle
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.integrations import ray as aioray
from aiotransfer.testing import payload
from tests.integrations.ray import stub

MIB = 1 << 20


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> Iterator[stub.Context]:
    monkeypatch.delenv("AIOTRANSFER_KEY", raising=False)
    yield stub.install(monkeypatch)
    sys.modules.pop(stub.OURS, None)


@pytest.fixture
def module(context: stub.Context) -> Any:
    return importlib.import_module(stub.OURS)


@pytest.fixture
def both(module: Any) -> Iterator[tuple[Any, Any]]:
    """The transports of two processes."""
    owner, reader = module.AioTransport(), module.AioTransport()
    yield owner, reader
    reader.close()
    owner.close()
    gc.collect()


def sent(owner: Any, name: str, arrays: list[Any]) -> Any:
    """What arrives at the other process of an object's metadata."""
    return pickle.loads(pickle.dumps(owner.extract_tensor_transport_metadata(name, arrays)))


def test_it_tells_ray_what_it_is(module: Any) -> None:
    transport = module.AioTransport()
    assert transport.tensor_transport_backend() == "AIOTRANSFER"
    assert transport.is_one_sided()
    assert transport.can_abort_transport()
    with pytest.raises(NotImplementedError):
        transport.send_multiple_tensors([], None, None)
    transport.garbage_collect("x", None, [])  # before anything was opened
    transport.close()


def test_arrays_arrive_as_they_were(both: tuple[Any, Any]) -> None:
    owner, reader = both
    arrays = [np.arange(6, dtype=np.int16).reshape(2, 3), np.array(2.5), np.empty((0, 4)), payload(2 * MIB).view(np.complex128)]
    metadata = sent(owner, "x", arrays)
    assert metadata.tensor_device == "cpu"
    assert metadata.tensor_meta == [(array.shape, array.dtype) for array in arrays]
    found = reader.recv_multiple_tensors("x", metadata, reader.get_communicator_metadata(None, None))
    for got, array in zip(found, arrays, strict=True):
        assert (got.shape, got.dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(got, array)
        assert got.flags.writeable


@pytest.mark.demo
def test_tensors_of_torch_arrive_as_they_were(both: tuple[Any, Any]) -> None:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # its own threads would stay
    owner, reader = both
    whole = torch.arange(1 << 19, dtype=torch.float32)
    tensors = [
        whole[100:200].view(10, 10), whole, torch.tensor(3.5, dtype=torch.bfloat16), torch.empty(0, 3),
        torch.tensor([True, False]), torch.ones(3, requires_grad=True),
        torch.nn.Parameter(torch.ones(2)), torch.ones(7).to(torch.float8_e4m3fn),
    ]  # fmt: skip
    metadata = sent(owner, "x", tensors)
    assert len(metadata.offer.descriptors) == 6  # two share a storage, and one has no bytes
    found = reader.recv_multiple_tensors("x", metadata, None)
    for got, tensor in zip(found, tensors, strict=True):
        assert (got.shape, got.dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(got.view(torch.uint8), tensor.detach().contiguous().view(torch.uint8)) if got.ndim else got == tensor
    found[1][:] = 0  # a copy: the owner's tensor stays
    assert whole[5] == 5
    conjugated, elsewhere = torch.ones(2, dtype=torch.complex64).conj(), torch.ones(2, device="meta")
    for refused in (whole.view(-1, 2).T, conjugated, whole.to_sparse(), elsewhere):
        with pytest.raises(ValueError, match="send tensor"):
            owner.extract_tensor_transport_metadata("y", [refused])


def test_tensors_go_into_target_buffers(both: tuple[Any, Any]) -> None:
    owner, reader = both
    array, target = payload(MIB), np.zeros(MIB, np.uint8)
    metadata = sent(owner, "x", [array])
    request = reader.fetch_multiple_tensors("x", metadata, None, [target])
    assert reader.wait_fetch_complete(request)[0] is target
    assert np.array_equal(target, array)
    with pytest.raises(ValueError, match="target buffers have"):
        reader.fetch_multiple_tensors("x", metadata, None, [target[1:]])
    with pytest.raises(ValueError, match="not contiguous"):
        reader.fetch_multiple_tensors("x", metadata, None, [np.zeros(2 * MIB, np.uint8)[::2]])


def test_an_object_without_tensors(both: tuple[Any, Any]) -> None:
    owner, reader = both
    assert reader.recv_multiple_tensors("x", sent(owner, "x", []), None) == []


def test_several_fetches_run_at_once(both: tuple[Any, Any]) -> None:
    owner, reader = both
    arrays = [payload(MIB + number) for number in range(8)]
    requests = [reader.fetch_multiple_tensors(f"x{n}", sent(owner, f"x{n}", [one]), None) for n, one in enumerate(arrays)]
    for request, array in reversed(list(zip(requests, arrays, strict=True))):
        assert np.array_equal(reader.wait_fetch_complete(request, timeout=30)[0], array)


def test_garbage_collection_ends_the_offer(both: tuple[Any, Any], module: Any) -> None:
    owner, reader = both
    array = payload(1000)
    metadata = sent(owner, "x", [array])
    owner.garbage_collect("x", metadata, [array])
    deadline = time.monotonic() + 20
    while owner.statistics().offered_objects and time.monotonic() < deadline:
        time.sleep(0.002)
    with pytest.raises(module.RayDirectTransportError, match="StaleRegionError"):
        reader.recv_multiple_tensors("x", metadata, None)


def held(owner: Any, name: str) -> tuple[Any, threading.Event]:
    """Metadata of an object whose owner does not answer until the event is set."""
    go, stuck = threading.Event(), threading.Event()
    metadata = sent(owner, name, [payload(1000)])

    def block() -> None:
        stuck.set()
        go.wait(30)

    owner.node()._thread.call_soon(block)
    assert stuck.wait(30)
    return metadata, go


def test_a_wait_that_only_looks_lets_the_fetch_go_on(both: tuple[Any, Any]) -> None:
    owner, reader = both
    metadata, go = held(owner, "x")
    request = reader.fetch_multiple_tensors("x", metadata, None)
    with pytest.raises(TimeoutError):
        reader.wait_fetch_complete(request, timeout=0)
    go.set()
    assert np.array_equal(reader.wait_fetch_complete(request)[0], payload(1000))


def test_a_wait_that_is_over_ends_the_fetch(both: tuple[Any, Any], module: Any) -> None:
    owner, reader = both
    metadata, go = held(owner, "x")
    request = reader.fetch_multiple_tensors("x", metadata, None)
    with pytest.raises(TimeoutError, match="did not come within"):
        reader.wait_fetch_complete(request, timeout=0.01)
    assert request.future.done()
    with pytest.raises(module.RayDirectTransportError, match="aborted"):
        reader.wait_fetch_complete(request)
    go.set()
    assert np.array_equal(reader.recv_multiple_tensors("x", metadata, None)[0], payload(1000))


def test_an_abort_ends_a_receive_in_another_thread(both: tuple[Any, Any], module: Any) -> None:
    owner, reader = both
    metadata, go = held(owner, "x")
    told: list[BaseException] = []

    def receive() -> None:
        try:
            reader.recv_multiple_tensors("x", metadata, None)
        except BaseException as error:
            told.append(error)

    thread = threading.Thread(target=receive)
    thread.start()
    deadline = time.monotonic() + 20
    while not reader.node()._running and time.monotonic() < deadline:
        time.sleep(0.002)
    reader.abort_transport("x", None)
    thread.join(20)
    assert [type(one) for one in told] == [module.RayDirectTransportError]
    assert "aborted" in str(told[0])
    told.clear()
    go.set()
    assert np.array_equal(reader.recv_multiple_tensors("x", metadata, None)[0], payload(1000))  # both go on


def test_dropping_a_fetch_ends_it(both: tuple[Any, Any]) -> None:
    owner, reader = both
    metadata, go = held(owner, "x")
    future = reader.fetch_multiple_tensors("x", metadata, None).future
    gc.collect()
    deadline = time.monotonic() + 20
    while not future.done() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert future.cancelled()
    go.set()


def test_what_its_owner_says_must_fit(both: tuple[Any, Any]) -> None:
    owner, reader = both
    metadata = sent(owner, "x", [payload(1000)])
    metadata.tensor_meta = [((1001,), np.dtype(np.uint8))]
    with pytest.raises(ValueError, match="sizes"):
        reader.fetch_multiple_tensors("x", metadata, None)


def test_another_machine_without_a_key_is_refused(both: tuple[Any, Any], module: Any, context: stub.Context) -> None:
    owner, reader = both
    metadata = sent(owner, "x", [payload(10)])
    context.node = "node 2"
    with pytest.raises(module.RayDirectTransportError, match="AIOTRANSFER_KEY"):
        reader.fetch_multiple_tensors("x", metadata, None)


def test_where_an_engine_listens(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.listen_address() == "127.0.0.1:0"
    monkeypatch.setenv("AIOTRANSFER_KEY", "0123456789abcdef0123456789abcdef")
    assert module.listen_address() == "127.0.0.2:0"
    monkeypatch.setattr(sys.modules["ray"].util, "get_node_ip_address", lambda: "fd00::1")
    assert module.listen_address() == "[fd00::1]:0"


def test_an_actor_is_asked_once_whether_it_has_it(module: Any) -> None:
    asked: list[Any] = []

    class Actor:
        """As a handle of an actor: calls run at once."""

        @property
        def __ray_call__(self) -> Any:
            def remote(fn: Any) -> bool:
                asked.append(fn)
                return bool(fn(self))

            return SimpleNamespace(options=lambda concurrency_group: SimpleNamespace(remote=remote))

    transport, actor = module.AioTransport(), Actor()
    assert transport.actor_has_tensor_transport(actor)
    assert transport.actor_has_tensor_transport(actor)
    assert asked == [module.usable_here]


def test_registering_is_silent_the_second_time(context: stub.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(Tensor=np.ndarray))
    aioray.register()
    aioray.register()
    info = sys.modules["ray.experimental.rdt.util"].transport_manager_info["AIOTRANSFER"]
    assert info.devices == ["cpu"]
    assert aioray.statistics().fetched_objects == 0
    sys.modules["ray.experimental.rdt.util"].get_tensor_transport_manager("AIOTRANSFER").close()


@pytest.mark.parametrize("missing", ["ray.experimental.rdt.util", "torch"])
def test_what_is_missing_is_said_with_what_to_do(context: stub.Context, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(Tensor=np.ndarray))
    monkeypatch.setitem(sys.modules, missing, None)  # type: ignore[arg-type]
    with pytest.raises(at.ConfigurationError, match="pip install 'aiotransfer"):
        aioray.register()
