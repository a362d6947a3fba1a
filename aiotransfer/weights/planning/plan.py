"""The schedule that `make_plan` makes: arrays, no object for a write. Pure; the same on every rank."""

from __future__ import annotations

from typing import Any

from aiotransfer.weights.planning import codec, explain, picture, tasks
from aiotransfer.weights.planning.balance import Balance
from aiotransfer.weights.planning.codec import MOST_BYTES
from aiotransfer.weights.planning.schedule import Schedule
from aiotransfer.weights.planning.tasks import Expected, Tasks, Writes


class Plan(Schedule):
    """A static schedule from one layout of trainers to one or more instances. Made by `make_plan` or
    `Plan.decode`.

    `trainer` (Layout), `instances` ({name: Layout}, in order), `fanout`, `staging_bytes`, `phases` (tuple of
    mesh groups in order), `names`, `shapes`, `dtypes` (of the inference tensors of all instances, T of them:
    those of the first instance in its order, then those of the next that are made otherwise; a name may stand
    more than once). *Receivers* are numbered through all instances: `receiver(instance, rank)`. *Target
    pieces* are numbered through all instances, too: `piece_base[i]` is the number of the first piece of
    instance i. D is the number of dimensions of the instances' arrays, the most that any has.

    Tensors [T]: `tensor_kind` (0 copy, 1 cast or another order of dimensions, 2 quantise, 3 the scales of a
    quantised one; -1: not part of this update), `tensor_scale` (the tensor that takes its scales, or -1),
    `tensor_block` [T, 2], `tensor_phase` (index into `phases`), `tensor_home` [T, 2] (the instance whose
    layout describes it, and its number there). `instance_tensor`: the numbers of the tensors of each
    instance, in the order of its layout, one instance after the other.

    Links [L]: a box of a trainer tensor is a box of an inference tensor: `link_source`, `link_target`
    (tensors), `link_low`, `link_high` (the box in the source), `link_axes`, `link_shift` [L, D]: dimension j
    of the target is dimension `axes[j]` of the source plus `shift[j]`; where `axes[j]` is -1, it is the one
    place `shift[j]`.

    Units [U], boxes of inference tensors without overlaps: `unit_tensor`, `unit_start`, `unit_stop` [U, D];
    of quantised tensors in whole blocks.

    Jobs [J], a unit that one trainer rank sends, sorted by sender, phase, part and the order in which to do
    them: `job_unit`, `job_sender`, `job_part` (what is in staging memory at one time: parts of one sender and
    phase come one after the other, part p and p + 1 use different halves of the staging memory, so part p + 2
    may begin when all writes of part p have ended), `job_in` (byte in the staging memory where its gathered
    input lies, dense, in the trainers' type; -1: the input is used where it is), `job_out` (byte in the
    staging memory where its output lies, dense, in the target's type; -1: sent from where it is), `job_scale`
    (where its scales lie, dense float32; -1: none).

    Inputs [I], sorted by job: `input_job`, `input_piece` (piece of the trainer layout), `input_link`. A job
    whose `job_in` is
    -1 has exactly one, on its own rank. Pieces of other ranks are read from those (a block that a shard's edge cuts).

    Moves [M], sorted by job: `move_job`, `move_piece` (target piece), `move_scale` (1: the scales of the
    job's blocks, 0: its data). What is moved is what the unit and the target piece have in common.

    Relays [X], sorted by relaying receiver: `relay_move` (the move whose bytes, once landed, are passed on
    from where they landed), `relay_piece` (target piece of another instance).
    """

    def balance(self) -> Balance:
        """How evenly bytes are spread over senders, receivers and NICs, beside the best that the placements
        allow."""
        return Balance.of(self)

    # ---- what a rank does ----

    def tasks(self, sender: int) -> Tasks:
        """What trainer rank `sender` gathers, makes and writes, in order. Raises `IndexError` for a rank that
        does not exist."""
        return tasks.tasks(self, sender)

    def relays(self, instance: str, rank: int) -> Writes:
        """What rank `rank` of `instance` (a name) passes on to other instances; nothing but with fanout
        "relay". Raises `KeyError` for an instance and `IndexError` for a rank that does not exist."""
        return tasks.relays(self, instance, rank)

    def expected(self, instance: str, rank: int) -> Expected:
        """What rank `rank` of `instance` (a name) is sent, by whom, in which phase and part: it is whole when
        all of that has come. Raises `KeyError` for an instance and `IndexError` for a rank that does not
        exist."""
        return tasks.expected(self, instance, rank)

    # ---- for people ----

    def diff(self, other: Plan) -> list[str]:
        """How `other` differs from this plan, as texts; empty for equal plans. Raises `TypeError` for what is
        no plan."""
        if not isinstance(other, Plan):
            raise TypeError(f"a plan is compared with a plan, not with {type(other).__name__}")
        return explain.diff(self, other)

    def explain(self, *, svg: bool = False) -> str:
        """How much each rank sends to each other, and what is made on the way: as a text, or with `svg` as a
        picture (SVG)."""
        return picture.svg(self) if svg else explain.text(self)

    # ---- as bytes ----

    def encode(self) -> bytes:
        """As bytes for `decode`, layouts included: versioned, compressed, with a checksum; no pickle."""
        return codec.encode(self)

    @staticmethod
    def decode(data: Any, *, most_bytes: int = MOST_BYTES) -> Plan:
        """The plan of which `encode` made `data` (bytes or another buffer). Raises `DescriptorError` for
        anything else, and before it would take more than `most_bytes` (default: 8 GiB)."""
        return codec.decode(Plan, data, most_bytes=most_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan.decode, (self.encode(),)

    def __repr__(self) -> str:
        ends = f"{self.trainer.ranks} trainer ranks to {self.receivers} ranks of {len(self.instances)} instances"
        return (
            f"<Plan: {ends}, {len(self.job_unit)} jobs, {len(self.move_job)} moves, {len(self.relay_move)} relays, {self.fanout}>"
        )
