"""What the command says of a large model's plan: as values, as a text, as a page's section. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from aiotransfer.weights.planning.balance import Balance
from aiotransfer.weights.planning.explain import size
from aiotransfer.weights.planning.plan import Plan
from aiotransfer.weights.scale import constants as c
from aiotransfer.weights.scale import predict
from aiotransfer.weights.scale.models import MODELS, Model
from aiotransfer.weights.scale.placements import Placement
from aiotransfer.weights.scale.predict import Comparison, Loads, Row


@dataclass(frozen=True, slots=True)
class Report:
    """A plan and what was found. `seconds`: what planning took (layouts, plan), `peak_bytes`: the most memory
    of the process until then; `writes`: contiguous writes of all senders; `load`: of the most loaded ranks;
    `paper`, `own`: predicted stages by the paper's way and by the plan's; `compared`: published figures."""

    model: Model
    placement: Placement
    nic_gbit: float
    plan: Plan
    balance: Balance
    seconds: tuple[float, float]
    peak_bytes: int
    writes: int
    load: Loads
    paper: list[Row]
    own: list[Row]
    compared: list[Comparison]

    @classmethod
    def of(
        cls, model: Model, placement: Placement, nic_gbit: float, plan: Plan, seconds: tuple[float, float], peak_bytes: int
    ) -> Report:
        """The report of a plan: its counts, and the predicted times."""
        balance = plan.balance()
        load, writes = predict.loads(plan, balance)
        return cls(
            model, placement, nic_gbit, plan, balance, seconds, peak_bytes, writes, load,
            predict.paper_way(model, placement, load, nic_gbit), predict.plan_way(model, placement, load, nic_gbit),
            predict.compared(nic_gbit, {(model, placement): load}),
        )  # fmt: skip

    def spreads(self) -> list[tuple[str, int, int, float, float | None]]:
        """(who, how many, bytes of the most loaded, over the mean, over the bound) of senders, NICs and
        receivers."""
        b = self.balance
        arrived = predict.by_nic(self.plan, b)
        return [
            ("senders", len(b.sent), int(b.sent.max()), b.over_mean(b.sent), b.sender),
            ("NICs of senders", len(b.nic_sent), int(b.nic_sent.max()), b.over_mean(b.nic_sent), b.nic),
            ("receivers", len(b.received), int(b.received.max()), b.over_mean(b.received), None),
            ("NICs of receivers", len(arrived), int(arrived.max()), b.over_mean(arrived), None),
        ]

    def values(self) -> dict[str, Any]:
        """Everything as plain values, for JSON; bytes, seconds and milliseconds by the names of keys."""
        plan = self.plan
        return {
            "model": {"name": self.model.name, "layers": self.model.layers, "experts": self.model.experts,
                      "parameters": predict.counted(self.model), "published_parameters": self.model.parameters,
                      "source": self.model.source},
            "placement": asdict(self.placement), "nic_gbit": self.nic_gbit,
            "tensors": {"trainers": len(plan.trainer.names), "inference": len(plan.names)},
            "pieces": {"trainers": len(plan.trainer.piece_rank), "inference": int(plan.piece_base[-1])},
            "jobs": len(plan.job_unit), "moves": len(plan.move_job), "writes": self.writes,
            "bytes": {"received": self.balance.bytes, "sent": int(self.balance.sent.sum()),
                      "gathered": int(self.balance.gathered.sum())},
            "balance": {who: {"count": count, "most_bytes": most, "over_mean": mean, "over_bound": bound}
                        for who, count, most, mean, bound in self.spreads()},
            "bounds": {"sender_bytes": self.balance.sender_bound, "nic_bytes": self.balance.nic_bound},
            "most_loaded": asdict(self.load),
            "planning": {"layouts_s": self.seconds[0], "plan_s": self.seconds[1], "peak_bytes": self.peak_bytes},
            "predicted_ms": {
                "paper": [{"stage": r.name, "ms": r.ms, "published_ms": r.published, "error": error(r.ms, r.published)}
                          for r in self.paper],
                "plan": [{"stage": r.name, "ms": r.ms} for r in self.own],
            },
            "published": [
                {"what": x.figure.what, "seconds": x.figure.seconds, "source": x.figure.source, "assumed": x.figure.assumed,
                 "paper_s": x.paper, "paper_error": error(x.paper, x.figure.seconds),
                 "plan_s": x.plan, "plan_error": error(x.plan, x.figure.seconds)}
                for x in self.compared
            ],
        }  # fmt: skip

    # ---- for people ----

    def text(self) -> str:
        """The whole report as lines for a terminal."""
        plan = self.plan
        parts = [
            [title(self.model, self.placement)],
            [f"{name}: {value}" for name, value in self.numbers()],
            aligned(("", "number", "most loaded", "over mean", "over the bound"), self.balance_rows()),
            aligned(*self.paper_table("the paper's way, ms", "predicted")),
            aligned(("this plan, stages overlap, ms", "predicted"), [(row.name, f"{row.ms:.0f}") for row in self.own]),
            aligned(("published", "s", "paper's way", "this plan"), self.published_rows()),
        ]
        if plan.fanout != "direct":
            parts[0].append(f"fanout {plan.fanout}")
        return "\n\n".join("\n".join(part) for part in parts)

    def numbers(self) -> Iterator[tuple[str, str]]:
        """(what, how much) of the plan as a whole."""
        plan, b = self.plan, self.balance
        yield "parameters", f"{predict.counted(self.model) / 1e9:.1f} billion ({self.model.source})"
        yield "tensors", f"{len(plan.trainer.names):,} at the trainers, {len(plan.names):,} at the inference side with scales"
        yield "pieces", f"{len(plan.trainer.piece_rank):,} at the trainers, {int(plan.piece_base[-1]):,} at the inference side"
        yield "writes", f"{self.writes:,} ({len(plan.move_job):,} moves of {len(plan.job_unit):,} jobs)"
        yield (
            "bytes",
            f"{size(b.bytes)} arrive; {size(int(b.gathered.sum()))} are read between trainers, for blocks cut by shards",
        )
        yield "the busiest rank", f"{self.load.writes:,} writes in {self.load.calls} prepared calls, {self.load.parts} parts"
        yield "planning", f"{self.seconds[1]:.1f} s, and {self.seconds[0]:.1f} s for the layouts; at most {size(self.peak_bytes)}"

    def balance_rows(self) -> list[tuple[str, ...]]:
        """The rows of the table of balance as texts: `spreads` with units."""
        return [
            (who, f"{count}", size(most), f"{mean:.3f}", "" if bound is None else f"{bound:.3f}")
            for who, count, most, mean, bound in self.spreads()
        ]

    def paper_table(self, *head: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Head and rows of the table of the paper's stages; with its own figures where this is its
        placement."""
        if self.paper[-1].published is None:
            return head, [(r.name, f"{r.ms:.0f}") for r in self.paper]
        rows: list[tuple[str, ...]] = [
            (r.name, f"{r.ms:.0f}", f"{r.published or 0:.0f}", percent(r.ms, r.published)) for r in self.paper
        ]
        return (*head, "its table", "error"), rows

    def published_rows(self) -> list[tuple[str, ...]]:
        """The table of published figures."""
        return published_rows(self.compared)


def published_rows(compared: Iterable[Comparison]) -> list[tuple[str, ...]]:
    """(what, published, by the paper's way, by this plan), with errors."""

    def cell(value: float | None, figure: float) -> str:
        return "-" if value is None else f"{value:.2f} ({percent(value, figure)})"

    return [
        (x.figure.what, f"{x.figure.seconds:g}", cell(x.paper, x.figure.seconds), cell(x.plan, x.figure.seconds))
        for x in compared
    ]


def section(report: Report) -> str:
    """What a page says of one model."""
    lines = [f"### {title(report.model, report.placement)}", ""]
    lines += markdown(("", ""), report.numbers())
    lines += markdown(("", "number", "most loaded", "over the mean", "over the bound"), report.balance_rows())
    lines += markdown(*report.paper_table("the paper's way", "predicted ms"))
    lines += markdown(("this plan: stages overlap", "predicted ms"), [(row.name, f"{row.ms:.0f}") for row in report.own])
    return "\n".join(lines)


def figures(compared: list[Comparison]) -> str:
    """What a page says of published figures and constants."""
    lines = ["### Every published figure", "", "Seconds, and the error of the prediction.", ""]
    lines += markdown(("published", "s", "the paper's way", "this plan"), published_rows(compared))
    lines += ["### Published bytes", "", "GB of a rank; without a plan: everything even.", ""]
    lines += markdown(("published", "received", "ours", "most sent", "ours, the mean"), bytes_rows())
    lines += ["### What was assumed for them", ""]
    lines += markdown(("published", "source", "assumed"), [(x.what, x.source, x.assumed or "-") for x in c.PUBLISHED])
    lines += ["### Constants", ""]
    lines += markdown(("what", "value", "source"), constant_rows())
    return "\n".join(lines)


def bytes_rows() -> Iterator[tuple[str, ...]]:
    """Published bytes of a rank beside ours, with errors."""
    for figure in c.PUBLISHED:
        if figure.model and figure.gb_per_gpu and figure.most_sent_gb:
            load = predict.estimated(MODELS[figure.model], predict.placement_of(figure))
            got, sent = load.received / 1e9, load.sent / 1e9
            yield (
                figure.what, f"{figure.gb_per_gpu:g}", f"{got:.3f} ({percent(got, figure.gb_per_gpu)})",
                f"{figure.most_sent_gb:g}", f"{sent:.3f} ({percent(sent, figure.most_sent_gb)})",
            )  # fmt: skip


def constant_rows() -> Iterator[tuple[str, str, str]]:
    """The table of the constants that the prediction takes as given."""
    for stage in c.STAGES:
        calls = f"{stage.calls} calls" if stage.calls else "no calls given"
        yield f"{stage.name} (grows with {stage.by})", f"{stage.total_ms:g} ms, {calls}", c.TABLE_5
    for name in ("TOTAL_MS", "STAGE_BYTES", "STAGE_PARAMETERS", "NIC_GBIT", "NIC_USED", "POST_US", "CALL_US"):
        constant: c.Constant = getattr(c, name)
        yield name.lower(), f"{constant.value:.4g} {constant.unit}".strip(), constant.source


def title(model: Model, p: Placement) -> str:
    """One line: what goes from where to where."""
    kind = "fp8 with block scales" if p.quantise else "bf16"
    mesh = f"FSDP {p.fsdp}, PP {p.pp}, EP {p.ep}"
    goal = f"{p.inference} inference ranks ({p.instances} x EP {p.inference_ep})"
    return f"{model.name}: {p.trainers} trainers ({mesh}) to {goal}, {kind}"


def error(value: float | None, figure: float | None) -> float | None:
    """Of a prediction, as a share of the published figure; None where one of them is missing."""
    return None if value is None or not figure else value / figure - 1


def percent(value: float | None, figure: float | None) -> str:
    """The error as a text in per cent; "" where it is not known."""
    wrong = error(value, figure)
    return "" if wrong is None else f"{100 * wrong:+.0f} %"


def aligned(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A table for a terminal."""
    table = [head, *rows]
    widths = [max(len(row[k]) for row in table) for k in range(len(head))]
    return [
        "  ".join(
            text.ljust(width) if not k else text.rjust(width) for k, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]


def markdown(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A table for a page."""
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows), ""]
