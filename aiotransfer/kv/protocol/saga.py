"""What becomes of a request, as two tables: one for the decode side, one for the prefill side. Pure.

A request is a saga: reserve, stream, commit. Each step has a compensation, so that however it ends every page
is either delivered or provably free. The code runs on these tables (`Saga.feed` says where an event leads and
what is to be done, in order), and the state charts in the documentation are drawn from them (`chart`), so
that neither can say what the other does not do.

Every event is defined in every state: what is not in a table is *late* (a second cancel, a refusal after the
deadline) and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Step(NamedTuple):
    """Where an event leads and what is done on the way."""

    state: str
    actions: tuple[str, ...] = ()


Table = Mapping[tuple[str, str], Step]

# What may end a request before it is delivered, on the decode side; the record's outcome is named after it.
DECODE_FAILURES = ("cancelled", "late", "lost", "failed")

DECODE: Table = MappingProxyType(
    {
        ("new", "enter"): Step("claiming", ("claim pages",)),
        ("claiming", "claimed"): Step("reserving", ("lease", "ask", "count")),
        ("claiming", "refused here"): Step("free"),
        ("reserving", "taken"): Step("streaming", ("open block",)),
        ("reserving", "refused"): Step("releasing", ("revoke", "tell others")),
        **{("reserving", why): Step("releasing", ("revoke", "tell")) for why in DECODE_FAILURES},
        ("streaming", "counted"): Step("checking", ("check",)),
        **{("streaming", why): Step("releasing", ("revoke", "tell")) for why in DECODE_FAILURES},
        ("checking", "right"): Step("delivered", ("deliver",)),
        ("checking", "cancelled"): Step("releasing", ("revoke",)),
        ("checking", "wrong"): Step("releasing", ("revoke",)),
        ("delivered", "leave"): Step("releasing", ("revoke",)),
        ("releasing", "proved"): Step("free", ("free pages", "record")),
        ("releasing", "unproved"): Step("quarantined", ("record", "watch")),
        ("quarantined", "proved"): Step("free", ("free pages",)),
    }
)

PREFILL: Table = MappingProxyType(
    {
        ("gathering", "reserved"): Step("gathering", ("answer",)),
        ("gathering", "complete"): Step("offered", ("answer", "offer")),
        ("gathering", "cancelled"): Step("over", ("tell", "record")),
        ("gathering", "lost"): Step("over", ("tell", "record")),
        ("gathering", "late"): Step("over", ("tell", "record")),
        ("gathering", "failed"): Step("over", ("tell", "record")),
        ("offered", "accepted"): Step("streaming"),
        ("offered", "cancelled"): Step("over", ("withdraw", "tell", "record")),
        ("offered", "lost"): Step("over", ("withdraw", "tell", "record")),
        ("offered", "late"): Step("over", ("withdraw", "tell", "record")),
        ("offered", "failed"): Step("over", ("withdraw", "tell", "record")),
        ("streaming", "layer"): Step("streaming", ("post",)),
        ("streaming", "finish"): Step("committing", ("post tail", "drain")),
        ("streaming", "cancelled"): Step("draining", ("stop", "tell")),
        ("streaming", "lost"): Step("draining", ("stop", "tell")),
        ("streaming", "late"): Step("draining", ("stop", "tell")),
        ("streaming", "failed"): Step("draining", ("stop", "tell")),
        ("committing", "committed"): Step("over", ("record",)),
        ("committing", "cancelled"): Step("draining", ("stop", "tell")),
        ("committing", "lost"): Step("draining", ("stop", "tell")),
        ("committing", "late"): Step("draining", ("stop", "tell")),
        ("committing", "failed"): Step("draining", ("stop", "tell")),
        ("draining", "drained"): Step("over", ("record",)),
    }
)


class Saga:
    """One request on its way through a table."""

    __slots__ = ("_table", "state")

    def __init__(self, table: Table, state: str) -> None:
        self._table = table
        self.state = state

    def feed(self, event: str) -> tuple[str, ...] | None:
        """Go on, and say what is to be done; None when the event is late and changes nothing."""
        step = self._table.get((self.state, event))
        if step is None:
            return None
        self.state = step.state
        return step.actions


def states(table: Table) -> list[str]:
    """All states of a table, in order of appearance."""
    return list(dict.fromkeys(name for (state, _), step in table.items() for name in (state, step.state)))


def chart(table: Table) -> str:
    """The table as a state diagram (Mermaid)."""
    names = {name: name.replace(" ", "_") for name in states(table)}
    first = next(iter(table))[0]
    lines = ["stateDiagram-v2", f"    [*] --> {names[first]}"]
    for (state, event), step in table.items():
        does = f" / {', '.join(step.actions)}" if step.actions else ""
        lines.append(f"    {names[state]} --> {names[step.state]}: {event}{does}")
    ends = [name for name in names if all(state != name for state, _ in table)]
    return "\n".join([*lines, *(f"    {names[end]} --> [*]" for end in ends)])
