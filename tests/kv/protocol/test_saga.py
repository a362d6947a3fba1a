"""The two tables of a request: every event in every state, every way to an end, and the charts."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotransfer.kv.decode.handle import ACTIONS as DECODE_ACTIONS
from aiotransfer.kv.prefill.request import ACTIONS as PREFILL_ACTIONS
from aiotransfer.kv.protocol.record import OUTCOMES
from aiotransfer.kv.protocol.saga import DECODE, DECODE_FAILURES, PREFILL, Saga, Step, Table, chart, states

TABLES = {"decode": DECODE, "prefill": PREFILL}
FIRST = {"decode": "new", "prefill": "gathering"}
ENDS = {"decode": {"free"}, "prefill": {"over"}}
ROLES = sorted(TABLES)


def events(table: Table) -> list[str]:
    return sorted({event for _, event in table})


def ways(role: str) -> list[list[str]]:
    """All that can happen to a request, as events from the first state to an end; loops are taken once."""
    found: list[list[str]] = []

    def go(state: str, path: list[str], taken: frozenset[tuple[str, str]]) -> None:
        steps = [(event, step) for (at, event), step in TABLES[role].items() if at == state]
        if not steps:
            found.append(path)
        for event, step in steps:
            if (state, event) not in taken:
                go(step.state, [*path, event], taken | {(state, event)})

    go(FIRST[role], [], frozenset())
    return found


def done(role: str, path: list[str]) -> list[str]:
    saga, actions = Saga(TABLES[role], FIRST[role]), list[str]()
    for event in path:
        step = saga.feed(event)
        assert step is not None
        actions += step
    return actions


@pytest.mark.parametrize("role", ROLES)
def test_every_event_in_every_state_is_a_step_of_the_table_or_late(role: str) -> None:
    table = TABLES[role]
    for state in states(table):
        for event in [*events(table), "never heard of"]:
            saga = Saga(table, state)
            actions = saga.feed(event)
            if (state, event) in table:
                assert Step(saga.state, actions or ()) == table[state, event]
                assert actions is not None
            else:
                assert actions is None
                assert saga.state == state


@pytest.mark.parametrize("role", ROLES)
def test_every_state_can_be_reached_and_reaches_an_end(role: str) -> None:
    table = TABLES[role]
    assert {state for state in states(table) if all(at != state for at, _ in table)} == ENDS[role]

    def reached(first: str) -> set[str]:
        found, new = {first}, {first}
        while new:
            new = {step.state for (at, _), step in table.items() if at in new} - found
            found |= new
        return found

    assert reached(FIRST[role]) == set(states(table))
    for state in states(table):
        assert reached(state) & ENDS[role], state


@pytest.mark.parametrize(("role", "actions"), [("decode", DECODE_ACTIONS), ("prefill", PREFILL_ACTIONS)])
def test_every_action_of_a_table_is_known_to_the_code_and_the_other_way_round(role: str, actions: dict[str, object]) -> None:
    assert {action for step in TABLES[role].values() for action in step.actions} == set(actions)


@pytest.mark.parametrize("role", ROLES)
def test_however_a_request_goes_it_is_recorded_once(role: str) -> None:
    for path in ways(role):
        assert done(role, path).count("record") == (0 if path[-1] == "refused here" else 1), path


def test_on_the_decode_side_whatever_was_claimed_and_leased_is_revoked_and_freed_once() -> None:
    for path in ways("decode"):
        actions = done("decode", path)
        claimed = "refused here" not in path
        for action in ("lease", "revoke", "free pages"):
            assert actions.count(action) == claimed, path
        if claimed:
            assert actions.index("claim pages") < actions.index("lease") < actions.index("revoke") < actions.index("free pages")
        assert ("quarantined" not in path) or actions.index("watch") < actions.index("free pages")


def test_on_the_decode_side_pages_are_delivered_only_after_they_were_counted_and_checked() -> None:
    for path in ways("decode"):
        actions = done("decode", path)
        assert ("deliver" in actions) == ("right" in path)
        if "deliver" in actions:
            assert actions.index("open block") < actions.index("check") < actions.index("deliver") < actions.index("revoke")


def test_on_the_prefill_side_whoever_is_told_of_a_failure_is_not_told_of_success() -> None:
    for path in ways("prefill"):
        actions = done("prefill", path)
        assert ("committed" in path) != ("tell" in actions), path
        assert actions.count("tell") <= 1


def test_on_the_prefill_side_what_is_being_written_is_stopped_and_drained_before_the_end() -> None:
    for path in ways("prefill"):
        actions = done("prefill", path)
        if "accepted" in path and "committed" not in path:
            assert actions.index("stop") < actions.index("record"), path
            assert path[-1] == "drained"


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("why", DECODE_FAILURES)
def test_what_can_go_wrong_can_be_named_in_a_record(role: str, why: str) -> None:
    assert why in OUTCOMES
    assert any(event == why for _, event in TABLES[role])


@given(st.sampled_from(ROLES), st.data())
def test_any_row_of_events_leaves_a_request_where_its_timely_ones_lead(role: str, data: st.DataObject) -> None:
    table = TABLES[role]
    saga, state = Saga(table, FIRST[role]), FIRST[role]
    for event in data.draw(st.lists(st.sampled_from(events(table)), max_size=40)):
        step = table.get((state, event))
        assert saga.feed(event) == (None if step is None else step.actions)
        state = state if step is None else step.state
        assert saga.state == state
        if state in ENDS[role]:
            assert all((state, other) not in table for other in events(table))


def test_tables_cannot_be_changed() -> None:
    for table in TABLES.values():
        with pytest.raises(TypeError):
            table["new", "enter"] = Step("free")  # type: ignore[index]


@pytest.mark.parametrize("role", ROLES)
def test_a_chart_shows_every_step_with_what_it_does_and_begins_and_ends_where_the_table_does(role: str) -> None:
    table, lines = TABLES[role], chart(TABLES[role]).splitlines()
    assert lines[:2] == ["stateDiagram-v2", f"    [*] --> {FIRST[role]}"]
    assert [line.split()[0] for line in lines if line.endswith("--> [*]")] == sorted(ENDS[role])
    shown = {}
    for line in lines[2:]:
        match = re.fullmatch(r"    (\w+) --> (\w+): ([^/]+?)(?: / (.+))?", line)
        if match:
            state, after, event, does = match.groups()
            shown[state, event] = Step(after, tuple(does.split(", ")) if does else ())
    assert shown == dict(table)
