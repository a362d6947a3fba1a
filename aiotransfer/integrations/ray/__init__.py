"""A tensor transport for Ray's direct transport: actors read tensors from each other's memory.

    from aiotransfer.integrations import ray as aioray

    aioray.register()                      # in the process that creates the actors, before their class is defined

    @ray.remote
    class Trainer:
        @ray.method(tensor_transport="aiotransfer")
        def weights(self): ...

Needs Ray with `register_tensor_transport` (tested: 2.60.0) and torch. Neither is imported before `register`
is called.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from aiotransfer.errors import ConfigurationError

if TYPE_CHECKING:
    from aiotransfer.integrations.ray.node import Statistics

NAME = "aiotransfer"
DEVICES = ("cpu",)
INSTALL = "pip install 'aiotransfer[ray,torch]' 'ray>=2.60'"


def register() -> None:
    """Make the transport known to Ray under the name "aiotransfer". Call it in the process that creates the
    actors, before a class whose methods name the transport is defined; Ray tells the actors. Twice is silent.

    Raises `ConfigurationError` where Ray or torch is missing, or Ray is too old.
    """
    transport, util = _modules()
    if transport.BACKEND not in util.transport_manager_info:
        torch = importlib.import_module("torch")
        util.register_tensor_transport(NAME, list(DEVICES), transport.AioTransport, torch.Tensor)


def statistics() -> Statistics:
    """What the transport of this process has done so far: call it in an actor, or in the driver. Raises like
    `register`, and `ValueError` where the transport is not registered."""
    transport, util = _modules()
    found: Statistics = util.get_tensor_transport_manager(transport.BACKEND).statistics()
    return found


def _modules() -> tuple[Any, Any]:
    """Our classes and Ray's registry of transports."""
    try:
        importlib.import_module("torch")
        util = importlib.import_module("ray.experimental.rdt.util")
        transport = importlib.import_module("aiotransfer.integrations.ray.transport")
    except ImportError as error:
        raise ConfigurationError(f"Ray's direct transport cannot be used: {error}", hint=f"{_version()}; {INSTALL}") from error
    return transport, util


def _version() -> str:
    try:
        return f"Ray {importlib.metadata.version('ray')} is installed"
    except importlib.metadata.PackageNotFoundError:
        return "Ray is not installed"
