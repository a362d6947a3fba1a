"""Balance of a share of a large model's plan, and predicted times by hand."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ElementTree

import pytest

from aiotransfer.weights import make_plan
from aiotransfer.weights.scale import constants as c
from aiotransfer.weights.scale import predict
from aiotransfer.weights.scale.models import MODELS
from aiotransfer.weights.scale.picture import svg
from aiotransfer.weights.scale.placements import Placement, inference_layouts, rules, trainer_layout
from aiotransfer.weights.scale.predict import DEFAULTS, Loads
from aiotransfer.weights.scale.report import Report, figures, section

SHARE = MODELS["kimi-k2"].cut(3, 32)
PLACE = Placement(trainers=64, inference=16, fsdp=16, pp=1, ep=4, inference_ep=8)


@pytest.fixture(scope="module")
def report() -> Report:
    plan = make_plan(trainer_layout(SHARE, PLACE), inference_layouts(SHARE, PLACE), rules(SHARE, PLACE))
    return Report.of(SHARE, PLACE, 400.0, plan, (0.5, 1.5), 1 << 20)


def test_the_most_loaded_sender_and_nic_are_near_the_bound(report: Report) -> None:
    assert 1.0 <= report.balance.sender <= 1.05
    assert 1.0 <= report.balance.nic <= 1.05
    assert report.balance.sent.sum() == report.balance.received.sum()


def test_evening_out_cuts_no_rows_into_parts(report: Report) -> None:
    assert report.writes == len(report.plan.move_job), "a move of whole rows is one write"
    tasks = [report.plan.tasks(rank).writes for rank in range(PLACE.trainers)]
    assert sum(len(writes.nbytes) for writes in tasks) == report.writes
    assert report.load.writes == max(len(writes.nbytes) for writes in tasks)
    busiest = max(tasks, key=lambda writes: len(writes.nbytes))
    calls = list(busiest.calls())
    assert report.load.calls == len(calls) == len({(call.phase, call.part, call.receiver) for call in calls})


def test_stages_of_the_papers_own_case_are_its_table() -> None:
    model, place = MODELS["kimi-k2"], DEFAULTS["kimi-k2"]
    rate = 400e9 / 8 * 0.91
    rows = predict.paper_way(model, place, Loads(sent=1, received=int(1.5 * rate)), 400.0)
    assert [row.published for row in rows] == [184, 518, 18, 88, 26, 399, 1233]
    assert [row.ms for row in rows[:2]] == pytest.approx([184, 518], rel=1e-3)
    many = predict.parameters(model, place)
    assert many == 523  # of the stage with layers 0 to 30: 1 + 12 + 30 * 17 = its embedding, the dense layer, the others
    busy = sum(row.ms for row in rows[:5])
    assert rows[5].ms == pytest.approx(busy / many + 1500 - busy)
    assert rows[6].ms == pytest.approx(busy / many + 1500)


def test_a_plans_stages_overlap() -> None:
    model, place = MODELS["kimi-k2"], DEFAULTS["kimi-k2"]
    rate = 400e9 / 8 * 0.91
    load = Loads(int(0.2 * rate), int(0.6 * rate), int(0.05 * rate), writes=1000, calls=100, parts=8)
    rows = {row.name: row.ms for row in predict.plan_way(model, place, load, 400.0)}
    assert rows["posting"] == pytest.approx((1000 * 0.5 + 100 * 23) / 1e3)
    assert rows["bytes out by the most loaded NIC"] == pytest.approx(250)
    assert rows["total"] == pytest.approx(600 + (184 + 50 + 88 + 2.8) / 8, rel=1e-3)
    slower = predict.plan_way(model, place, load, 200.0)
    assert slower[-1].ms == pytest.approx(1200 + (184 + 100 + 88 + 2.8) / 8, rel=1e-3)
    plain = predict.plan_way(model, dataclasses.replace(place, quantise=False), load, 400.0)
    assert {row.name: row.ms for row in plain}["quantise"] == 0


def test_weights_that_lie_on_the_gpus_are_not_copied_there() -> None:
    model, place = MODELS["kimi-k2"], dataclasses.replace(DEFAULTS["kimi-k2"], offloaded=False)
    load = Loads(sent=1, received=1, parts=8)
    for way, total in ((predict.paper_way, 518 + 88 + (18 + 26) * 523 / 487), (predict.plan_way, 88 * 9 / 8)):
        rows = {row.name: row.ms for row in way(model, place, load, 400.0)}
        assert rows["H2D memcpy"] == 0
        assert rows["total"] == pytest.approx(total, rel=1e-3)


def test_every_published_figure_is_compared_or_says_that_it_cannot_be() -> None:
    compared = predict.compared(400.0, {})
    assert [x.figure for x in compared] == list(c.PUBLISHED)
    assert [x.figure.what for x in compared if x.plan is None] == ["Ray RDT"]
    glm = next(x for x in compared if "bytes on the wire" in x.figure.what)
    assert glm.plan == pytest.approx(82.5e9 / 45.5e9)


def test_a_report_has_every_number_as_values_text_page_and_picture(report: Report) -> None:
    values = json.loads(json.dumps(report.values()))
    assert values["balance"]["senders"]["over_bound"] == pytest.approx(report.balance.sender)
    assert values["bytes"]["received"] == report.balance.bytes
    assert values["predicted_ms"]["plan"][-1]["stage"] == "total"
    assert len(values["published"]) == len(c.PUBLISHED)
    text, whole = report.text(), section(report) + figures(report.compared)
    for stage in (row.name for row in (*report.paper, *report.own)):
        assert stage in text
        assert stage in whole
    assert all(figure.source in whole for figure in c.PUBLISHED)
    assert all(len(line) > 2 for line in whole.splitlines() if line.startswith("|"))
    picture = ElementTree.fromstring(svg(report))
    assert "64 trainers (FSDP 16, PP 1, EP 4)" in "".join(picture.itertext())
