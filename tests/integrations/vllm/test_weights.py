"""Trainers and workers of one process, against a stub of vLLM: whole versions, or the one before; nothing is lost silently."""

from __future__ import annotations

import base64
import importlib
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.integrations.vllm import register
from aiotransfer.integrations.vllm.weights import messages
from tests.integrations.vllm import stub

SHAPES = {"embed.weight": (40, 16), "layers.0.qkv.weight": (48, 16), "layers.0.norm.weight": (16,)}


def parameters(value: float) -> dict[str, Any]:
    return {name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()}


class World:
    """One stub of vLLM, a trainer's module, workers with their models, and their client."""

    def __init__(
        self, vllm: types.SimpleNamespace, *, ranks: int = 1, engines: int = 1, names: tuple[str, ...] = tuple(SHAPES)
    ) -> None:
        self.vllm = vllm
        self.module = stub.Module(parameters(1.0))
        self.models = [stub.Model(names) for _ in range(engines * ranks)]
        self.workers = [
            vllm.workers.create_engine("aiotransfer", stub.config_of(f"e{k // ranks}", k % ranks, ranks), model)
            for k, model in enumerate(self.models)
        ]
        self.client = stub.Client(self.workers)
        self.trainers: list[Any] = []

    def trainer(self, source: Any = None, **options: Any) -> Any:
        module = importlib.import_module("aiotransfer.integrations.vllm.weights.trainer")
        info = module.AioTransferTrainerInitInfo(**{"rank": 0, "timeout": 20.0, **options})
        given = self.vllm.source(self.module) if source is None else source
        made = self.vllm.trainers.trainer_init(info, client=self.client, source=given)
        self.trainers.append(made)
        return made

    def train(self, value: float) -> None:
        for array in self.module.parameters.values():
            array[...] = value

    def seen(self) -> list[set[float]]:
        """The numbers in the parameters of each model; none where it was never loaded."""
        return [
            {float(x) for array in model.parameters.values() if array is not None for x in np.asarray(array).flat}
            for model in self.models
        ]

    def close(self) -> None:
        for one in [*self.trainers, *self.workers]:
            one.shutdown()
            one.shutdown()


Make = Callable[..., World]


@pytest.fixture(params=["0.32", "0.33"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    vllm = stub.install(monkeypatch, request.param)
    register()
    worker = importlib.import_module("aiotransfer.integrations.vllm.weights.worker")
    monkeypatch.setattr(worker, "as_torch", lambda tensor: tensor)  # the stub's models take arrays: this needs no torch
    made: list[World] = []

    def world(**options: Any) -> World:
        made.append(World(vllm, **options))
        return made[-1]

    yield world
    for one in made:
        one.close()


@contextmanager
def listed(kind: type[BaseException], *texts: str) -> Iterator[pytest.ExceptionInfo[Any]]:
    with pytest.raises(kind) as error:
        yield error
    for text in texts:
        assert text in str(error.value)


def test_each_version_is_loaded_as_a_whole_and_numbers_rise(make: Make) -> None:
    world = make()
    trainer = world.trainer()
    for step in (1.0, 2.0):
        world.train(step)
        trainer.send_weights()
        assert world.seen() == [{step}]
    assert str(trainer.version) == "1.2"
    assert world.client.calls == ["init", "start", "update", ("finish", "1.1"), "start", "update", ("finish", "1.2")]


def test_all_workers_of_two_engines_load_the_same_version(make: Make) -> None:
    world = make(ranks=2, engines=2)
    world.trainer().send_weights()
    assert world.seen() == [{1.0}] * 4
    assert {worker.receiver.instance for worker in world.workers} == {"vllm e0 0", "vllm e1 0"}


def test_the_hooks_are_called_around_the_loading_alone(make: Make) -> None:
    world = make()
    found: list[Any] = []

    def hook(name: str) -> Callable[[], None]:
        return lambda: found.append((name, str(world.workers[0].receiver.present), world.models[0].reloads))

    world.trainer(pause=hook("pause"), resume=hook("resume")).send_weights()
    assert found == [("pause", "1.1", 0), ("resume", "1.1", 1)]


def test_a_version_that_did_not_come_changes_no_model_and_pauses_nothing(make: Make) -> None:
    world = make(ranks=2)
    found: list[str] = []
    trainer = world.trainer(pause=lambda: found.append("pause"))
    trainer.send_weights()
    world.train(2.0)
    others = messages.checkpoint([weights.Tensor("other", (2,), "float32")])
    for worker in world.workers:  # they expect another model from now on
        worker.receiver.join(trainer._sender.address, others, timeout=20.0)
    with pytest.raises(weights.PlanError):
        trainer.send_weights()
    assert world.seen() == [{1.0}, {1.0}]
    assert found == ["pause"]
    assert world.client.calls.count("start") == 1


def test_a_checkpoint_that_lacks_a_parameter_is_an_error_that_names_it(make: Make) -> None:
    world = make(names=(*SHAPES, "lm_head.weight"))
    resumed: list[str] = []
    trainer = world.trainer(resume=lambda: resumed.append("resume"))
    with listed(weights.UpdateError, "version 1.1 does not fill 1 parameters", "lm_head.weight") as error:
        trainer.send_weights()
    assert set(error.value.missing) == {"lm_head.weight"}
    assert trainer.version is None
    assert resumed == []


def test_a_layer_of_which_a_part_came_is_an_error(make: Make) -> None:
    """Of q, k and v, which are one parameter of the model, two came: vLLM says nothing, and serves what lay in memory."""
    world = make()
    (model,) = world.models
    model.layers = {"layers.0.qkv": stub.Layer(object(), came=1), "layers.1.qkv": stub.Layer(object(), came=0)}
    trainer = world.trainer()
    with listed(weights.UpdateError, "layers.0.qkv: 1 of its 2 elements came"):
        trainer.send_weights()
    assert trainer.version is None
    model.layers = {"layers.0.qkv": stub.Layer(object())}
    trainer.send_weights()
    assert str(trainer.version) == "1.2"


def test_a_head_that_is_the_embedding_needs_no_tensor_and_is_packed_again(make: Make) -> None:
    """A reload does neither: on CPUs the head would go on with the weights before, and say nothing."""
    world = make(names=(*SHAPES, "lm_head.weight"))
    (model,) = world.models
    shared = object()
    layers = model.layers = {"embed": stub.Layer(shared), "other": stub.Layer(object()), "lm_head": stub.Layer(shared)}
    world.trainer().send_weights()
    assert world.seen() == [{1.0}]
    assert [layer.packed for layer in layers.values()] == [0, 0, 1]


def test_after_an_error_while_loading_the_next_version_is_loaded_as_a_whole(make: Make) -> None:
    """vLLM's layers remember what they were given until a reload has ended, and its workers that an update is under way."""
    world = make(ranks=2)
    trainer = world.trainer()
    model = world.models[1]
    held = model.parameters.pop("layers.0.norm.weight")
    with listed(ValueError, "layers.0.norm.weight"):
        trainer.send_weights()
    assert trainer.version is None
    model.parameters["layers.0.norm.weight"] = held
    world.train(2.0)
    trainer.send_weights()
    assert world.seen() == [{2.0}, {2.0}]
    assert str(trainer.version) == "1.2"


def test_another_trainer_follows_with_versions_that_rise(make: Make) -> None:
    world = make()
    first = world.trainer()
    first.send_weights()
    first.shutdown()
    world.train(2.0)
    second = world.trainer()
    second.send_weights()
    assert str(second.version) == "2.1"
    assert world.seen() == [{2.0}]


def test_another_trainer_may_bring_other_tensors(make: Make) -> None:
    world = make()
    world.trainer().send_weights()
    for model in world.models:
        model.parameters["more.weight"] = None
    world.module.parameters["more.weight"] = np.full((3, 3), 1.0, np.float32)
    world.train(3.0)
    world.trainer().send_weights()
    assert world.seen() == [{3.0}]


def test_a_module_with_other_parameters_is_sent_from_their_memory(make: Make) -> None:
    world = make()
    trainer = world.trainer()
    trainer.send_weights()
    world.module.parameters = parameters(5.0)
    trainer.send_weights()
    assert world.seen() == [{5.0}]


def test_a_version_that_a_worker_does_not_have_is_refused_before_the_model_is_touched(make: Make) -> None:
    world = make()
    world.trainer().send_weights()
    (worker,) = world.workers
    with listed(weights.VersionError, "asks for version 1.7, this worker has 1.1"):
        worker.update_weights({"epoch": 1, "number": 7})
    assert world.models[0].reloads == 1
    world.train(2.0)
    world.trainers[0].send_weights()  # nothing is held any more
    assert world.seen() == [{2.0}]


def test_an_update_before_the_trainer_is_known_is_refused(make: Make) -> None:
    (worker,) = make().workers
    with listed(at.ClosedError, "no trainer has been named"):
        worker.update_weights({"epoch": 1, "number": 1})


GOOD = messages.invitation("127.0.0.1:1", messages.checkpoint([weights.Tensor("a", (2,), "float32")]), timeout=1.0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"layout": "no base64!"}, "base64"),
        ({"layout": 7}, "base64"),
        ({"layout": base64.b64encode(b"something else").decode()}, "another kind"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"timeout": "soon"}, "timeout"),
        ({"timeout": True}, "timeout"),
        ({"trainer": "nowhere"}, "nowhere"),
        ({"more": 1}, "more"),
    ],
)
def test_a_bad_invitation_is_refused_and_leaves_nothing(make: Make, change: dict[str, Any], text: str) -> None:
    (worker,) = make().workers
    with listed((ValueError, at.TransferError), text):  # type: ignore[arg-type]
        worker.init_transfer_engine(worker.parse_init_info(GOOD | change))
    assert worker.receiver.present is None


@pytest.mark.parametrize(
    "info", [{"epoch": -1, "number": 1}, {"epoch": 1, "number": "1"}, {"epoch": True, "number": 1}, {"epoch": 1}]
)
def test_a_bad_version_is_refused(make: Make, info: dict[str, Any]) -> None:
    (worker,) = make().workers
    with pytest.raises(ValueError, match=r"epoch|number"):
        worker.receive_weights(worker.parse_update_info(info))


def test_a_trainer_needs_a_source_and_a_type_to_cast_to(make: Make) -> None:
    world = make()
    module = importlib.import_module("aiotransfer.integrations.vllm.weights.trainer")
    info = module.AioTransferTrainerInitInfo(rank=0)
    with listed(ValueError, "source"):
        world.vllm.trainers.trainer_init(info, client=world.client, source=None)
    with listed(ValueError, "dtype", "int8"):
        world.trainer(dtype="int8")


def test_what_was_shut_down_sends_nothing_more(make: Make) -> None:
    world = make()
    trainer = world.trainer()
    trainer.shutdown()
    with listed(at.ClosedError, "shut down"):
        trainer.send_weights()


def test_a_client_that_fails_leaves_no_engine_behind(make: Make) -> None:
    world = make()

    def refuse(init_info: dict[str, Any]) -> None:
        raise OSError("no server")

    world.client.init_weight_transfer_engine = refuse  # type: ignore[method-assign]
    with listed(OSError, "no server"):
        world.trainer()
    assert world.trainers == []  # and the check for leaks finds no thread


def test_tensors_are_cast_on_their_way(make: Make) -> None:
    world = make()
    world.train(1 + 2.0**-20)
    world.trainer(dtype="float16").send_weights()
    assert world.seen() == [{1.0}]
    assert {array.dtype for array in world.models[0].parameters.values()} == {np.dtype(np.float16)}


class Passing:
    """A source whose tensors live for a moment: all of them in one piece of memory."""

    def __init__(self, version: str, torch: Any) -> None:
        self.value, self.left_out, self.shapes = 1.0, "", dict(SHAPES)
        self.scratch = torch.zeros(48, 16)
        metas = [stub.ParamMeta(name, torch.float32, shape) for name, shape in SHAPES.items()]
        self.metadata: Any = (lambda: metas) if version == "0.32" else metas

    def iter_full(self) -> Iterator[tuple[str, Any]]:
        for name, shape in self.shapes.items():
            if name == self.left_out:
                continue
            self.scratch.fill_(self.value)
            yield name, self.scratch.flatten()[: int(np.prod(shape))].reshape(shape)


class Passing32(Passing):
    """The same as 0.32 iterates."""

    iter_full = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return Passing.iter_full(self)


@pytest.mark.demo
@pytest.mark.parametrize("version", ["0.32", "0.33"])
def test_tensors_of_any_source_are_copied_as_they_come(make: Make, version: str) -> None:
    torch = pytest.importorskip("torch")
    world = make()
    source = (Passing32 if version == "0.32" else Passing)(version, torch)
    trainer = world.trainer(source)
    source.value = 4.0
    trainer.send_weights()
    assert world.seen() == [{4.0}]
    source.left_out = "embed.weight"
    with listed(ValueError, "embed.weight is missing"):
        trainer.send_weights()
    source.left_out, source.shapes["embed.weight"] = "", (1, 16)
    with listed(ValueError, "embed.weight has the shape (1, 16)"):
        trainer.send_weights()
    source.shapes = {**SHAPES, "more": (2,)}
    with listed(ValueError, "more was not announced"):
        trainer.send_weights()
    assert world.seen() == [{4.0}]


def test_quantised_models_are_not_asked_for_every_parameter(make: Make) -> None:
    world = make(names=(*SHAPES, "attn.k_scale"))
    world.workers[0].model_config.quantization = "fp8"
    world.trainer().send_weights()
    assert world.models[0].parameters["attn.k_scale"] is None
    assert world.seen() == [{1.0}]


@pytest.mark.demo
def test_arrays_are_seen_as_torch_tensors(make: Make) -> None:
    torch = pytest.importorskip("torch")
    make()
    module = importlib.reload(importlib.import_module("aiotransfer.integrations.vllm.weights.worker"))
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = module.as_torch(array)
    array[1, 2] = 9
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 9]]
    assert module.as_torch(tensor) is tensor
    assert isinstance(tensor, torch.Tensor)


@pytest.mark.parametrize("version", ["0.32", "0.33"])
def test_a_vllm_with_another_interface_is_named_in_the_log_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    """vLLM calls `register` for all its users: an error would end their processes."""
    stub.install(monkeypatch, version)
    monkeypatch.setattr(stub.Factory, "register_engine", lambda self, name, *, loader: None)
    register()
    assert "does not take aiotransfer" in caplog.text
