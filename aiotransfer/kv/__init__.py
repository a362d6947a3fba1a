"""KV caches between the workers of disaggregated serving: layouts, and which bytes of one go where in the other."""

from __future__ import annotations

from aiotransfer.kv.layout import KVLayout, LayoutMismatch, Place
from aiotransfer.kv.plan import PageTable, TransferPlan, pairs, plan_transfer, sources

__all__ = ["KVLayout", "LayoutMismatch", "PageTable", "Place", "TransferPlan", "pairs", "plan_transfer", "sources"]
