"""Prometheus metrics of one component in one registry. Prometheus is imported when the first is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aiotransfer.errors import ConfigurationError

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # bounds of buckets


class Maker:
    """Makes metrics whose names begin with `aiotransfer_`, the component and `_`. `registry`: None for
    Prometheus's own.

    Raises `ConfigurationError` without the extra `metrics`; its calls raise `ValueError` for a name that the
    registry has.
    """

    def __init__(self, component: str, registry: Any) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            hint = "pip install 'aiotransfer[metrics]'"
            raise ConfigurationError(f"metrics need prometheus_client: {error}", hint=hint) from error
        self._library = prometheus_client
        self._prefix = f"aiotransfer_{component}_"
        self._registry = prometheus_client.REGISTRY if registry is None else registry

    def counter(self, name: str, text: str, *labels: str) -> Any:
        """A counter; its name ends in `_total`."""
        return self._library.Counter(self._prefix + name, text, labels, registry=self._registry)

    def gauge(self, name: str, text: str, *labels: str) -> Any:
        """A value as it is now."""
        return self._library.Gauge(self._prefix + name, text, labels, registry=self._registry)

    def histogram(self, name: str, text: str, *labels: str, buckets: Sequence[float]) -> Any:
        """A histogram; `buckets` are upper bounds."""
        return self._library.Histogram(self._prefix + name, text, labels, registry=self._registry, buckets=buckets)
