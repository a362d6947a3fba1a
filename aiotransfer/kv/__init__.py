"""KV-cache transfer for disaggregated serving: from the rank that reads a prompt to the rank that goes on from there.

Layouts and the planner say which bytes go where (pure, of NumPy alone); `Decoder` and `Prefiller` move them: many requests at
once, each layer as soon as it is computed, counted instead of announced, and however a request ends its pages are delivered or
provably free.
"""

from __future__ import annotations

from aiotransfer.kv.decoder import Decoder
from aiotransfer.kv.errors import KVRequestError, RequestCancelled, RequestFailed, RequestRefused, WrongPageError
from aiotransfer.kv.handle import Arrival, Handle
from aiotransfer.kv.layout import KVLayout, LayoutMismatch, Place
from aiotransfer.kv.plan import PageTable, TransferPlan, pairs, plan_transfer, sources
from aiotransfer.kv.prefiller import Prefiller
from aiotransfer.kv.record import RequestRecord
from aiotransfer.kv.request import LayerWrite, PrefillRequest

__all__ = [
    "Arrival",
    "Decoder",
    "Handle",
    "KVLayout",
    "KVRequestError",
    "LayerWrite",
    "LayoutMismatch",
    "PageTable",
    "Place",
    "PrefillRequest",
    "Prefiller",
    "RequestCancelled",
    "RequestFailed",
    "RequestRecord",
    "RequestRefused",
    "TransferPlan",
    "WrongPageError",
    "pairs",
    "plan_transfer",
    "sources",
]
