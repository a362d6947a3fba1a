"""`python -m aiotransfer weights plan`: the plan of a large public model's update, computed from its shapes
alone."""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from aiotransfer.weights import PlanError, make_plan
from aiotransfer.weights.scale import constants as c
from aiotransfer.weights.scale.models import MODELS, Model
from aiotransfer.weights.scale.picture import svg
from aiotransfer.weights.scale.placements import Placement, inference_layouts, rules, trainer_layout
from aiotransfer.weights.scale.predict import DEFAULTS
from aiotransfer.weights.scale.report import Report, figures, section

BEGIN, END = "<!-- made by python -m aiotransfer weights plan --report -->", "<!-- end -->"
NUMBERS = {
    "trainers": "trainer ranks",
    "inference": "inference ranks",
    "fsdp": "shards of each tensor (default: what trainers, pp and ep leave)",
    "pp": "pipeline stages",
    "ep": "groups of experts at the trainers",
    "inference_ep": "ranks of an inference instance, which share its experts",
    "gpus_per_host": "ranks on a host",
    "gpus_per_nic": "ranks behind a NIC",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    sub = parser.add_subparsers(dest="what", required=True)
    text = "plan an update of a large model, and predict how long it takes"
    plan = sub.add_parser("plan", help=text, description=f"{text}; nothing is moved, and no weights are needed.")
    plan.add_argument("--model", choices=list(MODELS), default="kimi-k2", help="default: kimi-k2")
    for name, what in NUMBERS.items():
        plan.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"{what} (default: the model's)")
    plan.add_argument("--layers", type=int, metavar="N", help="only so many layers (default: all)")
    plan.add_argument("--experts", type=int, metavar="N", help="only so many experts of each layer (default: all)")
    plan.add_argument("--bf16", action="store_true", help="bf16 at the inference side, too (default: fp8 with block scales)")
    plan.add_argument("--on-gpu", action="store_true", help="trainers' weights lie on the GPUs (default: in the hosts' memory)")
    plan.add_argument("--fanout", choices=("direct", "relay"), default="direct", help="default: direct")
    plan.add_argument("--staging-mib", type=int, default=1024, metavar="N", help="temporary memory of a trainer rank (1024)")
    nic = f"of a NIC, of which {100 * c.NIC_USED.value:.0f} %% are used (default: {c.NIC_GBIT.value:g})"
    plan.add_argument("--nic-gbit", type=float, default=c.NIC_GBIT.value, metavar="RATE", help=nic)
    plan.add_argument("--json", action="store_true", help="all values as JSON")
    plan.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw loads and stages")
    plan.add_argument(
        "--report", type=Path, metavar="FILE.md",
        help="plan all models with their own placements, and write the marked section of this page and a picture beside it",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Plan, and say what was found; 2 for what cannot be."""
    try:
        if args.report is not None:
            return _page(args.report, args.nic_gbit)
        model = MODELS[args.model].cut(args.layers, args.experts)
        report = measure(model, placement(args), args.nic_gbit, args.staging_mib << 20, args.fanout)
    except (PlanError, ValueError, OSError) as error:
        print(f"weights plan: {error}", file=sys.stderr)
        return 2
    if args.picture is not None:
        args.picture.write_text(svg(report))
    print(json.dumps(report.values()) if args.json else report.text())
    return 0


def placement(args: argparse.Namespace) -> Placement:
    """The model's own placement with what was asked for in its place."""
    asked = {name: value for name in NUMBERS if (value := getattr(args, name)) is not None}
    result = dataclasses.replace(DEFAULTS[args.model], **asked, quantise=not args.bf16, offloaded=not args.on_gpu)
    if "fsdp" not in asked and result.pp > 0 and result.ep > 0:
        result = dataclasses.replace(result, fsdp=max(result.trainers // (result.pp * result.ep), 1))
    return result


def measure(model: Model, where: Placement, nic_gbit: float, staging_bytes: int = 1 << 30, fanout: str = "direct") -> Report:
    """Plan. Raises `PlanError` for a placement that cannot be, `ValueError` for other values."""
    if not 0 < nic_gbit < 1e6:
        raise ValueError(f"a NIC of {nic_gbit} Gbit/s cannot be")
    if problems := where.problems(model):
        raise PlanError("this placement cannot be", problems=problems)
    begin = time.monotonic()
    trainer, inference = trainer_layout(model, where), inference_layouts(model, where)
    ready = time.monotonic()
    plan = make_plan(trainer, inference, rules(model, where), staging_bytes=staging_bytes, fanout=fanout)
    seconds = (ready - begin, time.monotonic() - ready)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return Report.of(model, where, nic_gbit, plan, seconds, peak)


def _page(path: Path, nic_gbit: float) -> int:
    before = path.read_text()
    head, found, rest = before.partition(BEGIN)
    if not found or END not in rest:
        raise ValueError(f"{path} has no section between {BEGIN} and {END}")
    parts = []
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:  # each with a peak of memory of its own
        for text, part, end, picture in pool.map(_part, MODELS, [nic_gbit] * len(MODELS)):
            print(text, end="\n\n", flush=True)
            parts.append((part, end, picture))
    path.with_suffix(".svg").write_text(parts[0][2])
    middle = "\n".join([*(part for part, _, _ in parts), parts[0][1]])
    path.write_text(f"{head}{BEGIN}\n\n{middle}\n{END}{rest.partition(END)[2]}")
    return 0


def _part(name: str, nic_gbit: float) -> tuple[str, str, str, str]:
    """Of one model: text, section of the page, published figures, picture."""
    report = measure(MODELS[name], DEFAULTS[name], nic_gbit)
    return report.text(), section(report), figures(report.compared), svg(report)
