"""Guards of MoE."""

from __future__ import annotations

from tests.guards.mutant import Mutant

LISTENER = "aiotransfer/moe/communicator/listener.py"
BOOTSTRAP = "aiotransfer/moe/communicator/bootstrap.py"
COMING_BACK = "tests/moe/communicator/test_coming_back.py"
PARTED = "tests/moe/communicator/test_parted.py"
IDENTITY = "tests/moe/communicator/test_identity.py"
MESSAGES = "tests/moe/protocol/test_messages.py"
OUT_OF_STEP = "tests/moe/step/test_out_of_step.py"
GUARDS = (
    Mutant(
        "MoE: who waits itself is not named", "aiotransfer/moe/protocol/waits.py",
        "            left += earlier\n            if not earlier and", "            if", "tests/moe/protocol/test_waits.py",
    ),
    Mutant(
        "MoE: others are asked what they wait for", "aiotransfer/moe/step/handle.py",
        "                step.communicator.waiting.ask()  # most calls end long before this\n", "",
        "tests/moe/protocol/test_waits.py",
    ),
    Mutant(
        "MoE: arguments that do not fit the call", "aiotransfer/moe/calls.py",
        "                await refuse(a2a, error)\n",
        "", OUT_OF_STEP,
    ),
    Mutant(
        "MoE: who speaks for a rank", LISTENER,
        "or ranks.at(content.rank) is peer:",
        "or True:", IDENTITY,
    ),
    Mutant(
        "MoE: a reader goes on", LISTENER,
        "        except Exception as error:\n            self._failed(peer, error)",
        "        except MemoryError as error:\n            self._failed(peer, error)", IDENTITY,
    ),
    Mutant(
        "MoE: views that cannot be", LISTENER,
        "        if wrong and me not in",
        "        if False and me not in", IDENTITY,
    ),
    Mutant(
        "MoE: pieces of one message", "aiotransfer/moe/protocol/messages.py",
        "        if self._of != (piece.incarnation, piece.of) or piece.number != len(held):\n",
        "        if False:\n", MESSAGES,
    ),
    Mutant(
        "MoE: length of a message in pieces", "aiotransfer/moe/protocol/messages.py",
        "        if piece.of * PIECE > self._most + PIECE:\n",
        "        if False:\n", MESSAGES,
    ),
    Mutant(
        "MoE: ranks that are gone", "aiotransfer/moe/protocol/membership.py",
        "return len(self._gone) + len(self._present) >= MOST_GONE",
        "return False", IDENTITY,
    ),
    Mutant(
        "MoE: a rank that cannot set up says so", BOOTSTRAP,
        "            self._listener.say_unable(rank, peer, self._answers.incarnation(rank))\n",
        "            pass\n", IDENTITY,
    ),
    Mutant(
        "MoE: the others know that a rank cannot set up", LISTENER,
        "            answers.know_it.add(rank)\n", "            pass\n", IDENTITY,
    ),
    Mutant(
        "MoE: a rank that could not set up, and tries again", LISTENER,
        "        if unable.to == ranks.incarnation:\n", "        if True:\n", COMING_BACK,
    ),
    Mutant(
        "MoE: a rank is told once that another could not set up", LISTENER,
        "        if to and self._answers.told_to.get(rank) == to:\n            return\n", "", COMING_BACK,
    ),
    Mutant(
        "MoE: a rank that could not set up is asked", LISTENER,
        "            if answers.told:\n                self", "            if False:\n                self", COMING_BACK,
    ),
    Mutant(
        "MoE: a rank that could not set up hears a Hello", LISTENER,
        "            if hello.ask and answers.told:\n", "            if False:\n", COMING_BACK,
    ),
    Mutant(
        "MoE: that is acknowledged", LISTENER,
        "            ranks.send_to(peer, messages.Heard(rank=ranks.rank, incarnation=ranks.incarnation))\n", "",
        IDENTITY,
    ),
    Mutant(
        "MoE: whose memory a Hello describes", "aiotransfer/moe/communicator/greetings.py",
        "        if region.incarnation != peer.incarnation:\n", "        if False:\n", IDENTITY,
    ),
    Mutant(
        "MoE: what an earlier incarnation said wrong", LISTENER,
        "            if ranks.membership.incarnation(content.rank) != content.incarnation:\n", "            if False:\n",
        IDENTITY,
    ),
    Mutant(
        "MoE: an earlier incarnation that leaves", LISTENER,
        "        if hello is None or hello.incarnation != leave.incarnation:\n", "        if hello is None:\n", IDENTITY,
    ),
    Mutant(
        "MoE: a rank that leaves while the ranks meet", LISTENER,
        "        ranks.spawn(self._missed_early(rank, leave))\n", "", IDENTITY,
    ),
    Mutant(
        "MoE: a rank that has left has said nothing", LISTENER,
        "            del answers.hellos[rank]\n", "            return\n", COMING_BACK,
    ),
    Mutant(
        "MoE: memory that was offered to an earlier all-to-all of the engine", LISTENER,
        "        if hello.to not in (0, ranks.incarnation):", "        if False:", COMING_BACK,
    ),
    Mutant(
        "MoE: a Hello to an earlier all-to-all is answered", LISTENER,
        "                greetings.greet(rank, peer, ask=True)\n", "                pass\n", COMING_BACK,
    ),
    Mutant(
        "MoE: a rank that begins anew is not at work", LISTENER,
        "        if not hello.running or (rank in answers.early", "        if (rank in answers.early", COMING_BACK,
    ),
    Mutant(
        "MoE: a rank that is given up while it meets the others", LISTENER,
        "        if given_up:  # also", "        if given_up and membership is not None:  # also", COMING_BACK,
    ),
    Mutant(
        "MoE: of two sides one goes on", LISTENER,
        "            given_up = given_up and outweighs(present, {ranks.rank, *membership.audience})\n", "            return\n",
        PARTED,
    ),
    Mutant(
        "MoE: the other side goes on", LISTENER,
        "            given_up = given_up and outweighs(present, {ranks.rank, *membership.audience})\n", "", PARTED,
    ),
    Mutant(
        "MoE: which of two sides goes on", "aiotransfer/moe/protocol/membership.py",
        "    return theirs.isdisjoint(mine) and (len(theirs)", "    return (len(theirs)", PARTED,
    ),
    Mutant(
        "MoE: which of two sides a rank joins", "aiotransfer/moe/communicator/answers.py",
        "            best = side if outweighs(side, best) else best\n", "            best = best | side\n", PARTED,
    ),
    Mutant(
        "MoE: ranks of the other side are not joined", BOOTSTRAP,
        "            if hello.running and rank not in side:", "            if False:", PARTED,
    ),
    Mutant(
        "MoE: a side that takes in a rank of another one", LISTENER,
        "        return hello.running and bool(theirs)", "        return False and bool(theirs)", PARTED,
    ),
    Mutant(
        "MoE: a rank that has joined the lesser side", LISTENER,
        "        if hello.running and not membership.full and outweighs(", "        if False and outweighs(", PARTED,
    ),
    Mutant(
        "MoE: the lesser side is told", LISTENER,
        "                ranks.send(other, ranks.leave(other, reason))\n", "                pass\n", PARTED,
    ),
    Mutant(
        "MoE: a rank that ends tells all", "aiotransfer/moe/communicator/ranks.py",
        "            for rank in self.others():  # also",
        "            for rank in self.membership.audience if self.membership else self.others():  #", PARTED,
    ),
    Mutant(
        "MoE: a lost rank that says Hello again", LISTENER,
        "known.incarnation == hello.incarnation == membership.incarnation(rank):", "known.incarnation == hello.incarnation:",
        PARTED,
    ),
    Mutant(
        "MoE: a rank that says Hello by another connection", LISTENER,
        "            if known.peer is peer:\n                greetings", "            if True:\n                greetings",
        PARTED,
    ),
    Mutant(
        "MoE: a rank that was given up takes no part", "aiotransfer/moe/alltoall.py",
        " and (r != ranks.rank or ranks.over is None)", "", PARTED,
    ),
    Mutant(
        "MoE: what was said by ranks that did not take this one in", "aiotransfer/moe/communicator/answers.py",
        "            return self.side()\n", "            self.seen = self.seen | self.taken_in\n", COMING_BACK,
    ),
    Mutant(
        "MoE: the last view says which ranks are needed", "aiotransfer/moe/communicator/answers.py",
        "        self.taken_in.pop(rank, None)\n", "        if rank in self.taken_in:\n            return\n", COMING_BACK,
    ),
    Mutant(
        "MoE: the last Hello of a rank holds", "aiotransfer/moe/communicator/greetings.py",
        "            if peer is known.peer and hello is not known.hello:\n",
        "            if peer is known.peer and known.hello is None:\n", COMING_BACK,
    ),
    Mutant(
        "MoE: a Hello that is said twice", "aiotransfer/moe/communicator/greetings.py",
        "                if known.hello is None or known.hello.region != hello.region:", "                if True:", COMING_BACK,
    ),
    Mutant(
        "MoE: a rank that starts anew before all are ready", BOOTSTRAP,
        "                if rank in answers.hellos and answers.hellos[rank][1].incarnation != incarnations[rank]:\n",
        "                if False:\n", COMING_BACK,
    ),
    Mutant(
        "MoE: the others have begun while this one tries again to meet", BOOTSTRAP,
        "        if self._ranks.running:\n            return\n        if self._answers.at_work:\n",
        "        if self._answers.at_work:\n", COMING_BACK,
    ),
    Mutant(
        "MoE: what a rank had sent that was lost before all had met", BOOTSTRAP,
        "                    self._losses.forget(rank, lost_while_meeting(self._ranks, rank))\n", "                    pass\n",
        COMING_BACK,
    ),
    Mutant(
        "MoE: an all-to-all that cannot be made is told of", "aiotransfer/moe/communicator/unmade.py",
        "            _left_unmade(list(given), dict(named), error)\n", "", IDENTITY,
    ),
    Mutant(
        "MoE: one that is made answers for itself", "aiotransfer/moe/communicator/unmade.py",
        "if any(one.key == key and one.over is None for one in _made.get(engine, ())):", "if False:",
        IDENTITY,
    ),
    Mutant(
        "MoE: answers of one engine", "aiotransfer/moe/communicator/unmade.py",
        "    while len(there) >= MOST:\n", "    while False:\n", IDENTITY,
    ),
    Mutant(
        "MoE: lists that contradict each other", BOOTSTRAP,
        "            ranks.group.check_lists()\n", "", IDENTITY,
    ),
    Mutant(
        "MoE: innocents of ranks that do not meet", BOOTSTRAP,
        "        return silent or missing\n", "        return missing\n", IDENTITY,
    ),
    Mutant(
        "MoE: connected ranks are not dialled", "aiotransfer/moe/communicator/dials.py",
        "            if rank not in found and (known := ranks.at(rank)) is not None:\n",
        "            if False and (known := ranks.at(rank)) is not None:\n", IDENTITY,
    ),
    Mutant(
        "MoE: whatever an argument raises", "aiotransfer/moe/alltoall.py",
        "            except BaseException as error:  # of any kind", "            except (TypeError, ValueError) as error:  #",
        OUT_OF_STEP,
    ),
    Mutant(
        "MoE: a deadline that cannot be uses up the step", "aiotransfer/moe/alltoall.py",
        "            refusal, timeout = error, None\n", "            raise\n", OUT_OF_STEP,
    ),
    Mutant(
        "MoE: a first write that was not taken", "aiotransfer/moe/step/step.py",
        "            ranks.next_step = self.number\n            raise\n", "            raise\n", OUT_OF_STEP,
    ),
    Mutant(
        "MoE: digest of routing", "aiotransfer/moe/step/step.py",
        "elif any(mate.digest != head.digest for mate in mates):", "elif False:", OUT_OF_STEP,
    ),
    Mutant(
        "MoE: tags are compared", "aiotransfer/moe/step/step.py",
        "if len(tags := {head.tag for head in heads.values()}) > 1:", "tags = set(b'')\n        if len(tags) > 1:",
        OUT_OF_STEP,
    ),
    Mutant(
        "MoE: counts of a header", "aiotransfer/moe/protocol/header.py",
        "        if rows > self.tokens * shape.topk:\n", "        if False:\n", OUT_OF_STEP,
    ),
    Mutant(
        "MoE: sums over what is still read", "aiotransfer/moe/step/handle.py",
        "    if overlap(memory, stride, results, results_stride, shape.result_bytes):\n", "    if False:\n",
        OUT_OF_STEP,
    ),
    Mutant(
        "MoE: innocents in deadlines", "aiotransfer/moe/step/exchange.py",
        "if found := [r for r in waited if self.ranks.counter(kind, self.slot, r).value < expected[r]]:", "if found := waited:",
        OUT_OF_STEP,
    ),
    Mutant(
        "MoE: gradients that nobody gets", "aiotransfer/moe/step/tensors.py",
        'if getattr(array, "requires_grad", False) and', "if False and", "tests/moe/test_torch.py",
    ),
    Mutant(
        "moe: a reader outlives any exception of one message", LISTENER,
        "                except Exception as error:  # an error of ours in one message: the next one may be another rank's\n"
        "                    self._failed(message.peer, error)\n", "", IDENTITY,
    ),
)  # fmt: skip
