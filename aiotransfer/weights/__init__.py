"""New weights in place: from the ranks that train a model to the ranks that serve it.

Layouts say where the tensors of each side lie, rules how the one side's are made of the other's; `make_plan`
makes of them a static schedule of writes, or refuses with everything that does not fit.
"""

from __future__ import annotations

from aiotransfer.weights import checkpoint
from aiotransfer.weights.layouts.bind import Bound
from aiotransfer.weights.layouts.derive import layout_of, memory_of
from aiotransfer.weights.layouts.errors import PlanError
from aiotransfer.weights.layouts.layout import Layout, Piece, Tensor, merge
from aiotransfer.weights.layouts.shards import fused, placed, replicated, sharded
from aiotransfer.weights.planning.balance import Balance
from aiotransfer.weights.planning.plan import Plan
from aiotransfer.weights.planning.planner import make_plan
from aiotransfer.weights.planning.rules import Cast, Fuse, Quantise, Rename, Rule, Split, Stack, Tie, Transpose, Unstack
from aiotransfer.weights.protocol.errors import UpdateError, VersionError
from aiotransfer.weights.protocol.version import Version
from aiotransfer.weights.publisher.publisher import Publisher
from aiotransfer.weights.records.record import UpdateRecord
from aiotransfer.weights.subscriber.subscriber import Subscriber

__all__ = [
    "Balance",
    "Bound",
    "Cast",
    "Fuse",
    "Layout",
    "Piece",
    "Plan",
    "PlanError",
    "Publisher",
    "Quantise",
    "Rename",
    "Rule",
    "Split",
    "Stack",
    "Subscriber",
    "Tensor",
    "Tie",
    "Transpose",
    "Unstack",
    "UpdateError",
    "UpdateRecord",
    "Version",
    "VersionError",
    "checkpoint",
    "fused",
    "layout_of",
    "make_plan",
    "memory_of",
    "merge",
    "placed",
    "replicated",
    "sharded",
]
