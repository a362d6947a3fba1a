"""KV-cache transfer for disaggregated serving: from the rank that reads a prompt to the rank that goes on
from there.

Layouts and the planner say which bytes go where (pure, of NumPy alone); `Decoder` and `Prefiller` move them:
many requests at once, each layer as soon as it is computed, counted instead of announced, and however a
request ends its pages are delivered or provably free.
"""

from __future__ import annotations

from aiotransfer.kv.decode.decoder import Decoder
from aiotransfer.kv.decode.handle import Arrival, Handle
from aiotransfer.kv.prefill.prefiller import Prefiller
from aiotransfer.kv.prefill.request import LayerWrite, PrefillRequest
from aiotransfer.kv.protocol.errors import KVRequestError, RequestCancelled, RequestFailed, RequestRefused, WrongPageError
from aiotransfer.kv.protocol.layout import NO_PAGE, KVLayout, LayoutMismatch, Place
from aiotransfer.kv.protocol.plan import PageTable, TransferPlan, plan_transfer
from aiotransfer.kv.protocol.ranks import pairs, sources
from aiotransfer.kv.protocol.record import RequestRecord
from aiotransfer.kv.tensors import TensorPool, layout_from_tensors
from aiotransfer.kv.threads.decoder_thread import DecoderThread
from aiotransfer.kv.threads.prefiller_thread import Asked, PrefillerThread
from aiotransfer.kv.threads.requests import Finished

__all__ = [
    "NO_PAGE",
    "Arrival",
    "Asked",
    "Decoder",
    "DecoderThread",
    "Finished",
    "Handle",
    "KVLayout",
    "KVRequestError",
    "LayerWrite",
    "LayoutMismatch",
    "PageTable",
    "Place",
    "PrefillRequest",
    "Prefiller",
    "PrefillerThread",
    "RequestCancelled",
    "RequestFailed",
    "RequestRecord",
    "RequestRefused",
    "TensorPool",
    "TransferPlan",
    "WrongPageError",
    "layout_from_tensors",
    "pairs",
    "plan_transfer",
    "sources",
]
