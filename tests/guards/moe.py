"""Guards of MoE."""

from __future__ import annotations

from tests.guards.mutant import Mutant

GUARDS = (
    Mutant(
        "MoE: who waits itself is not named", "aiotransfer/moe/waits.py",
        "            left += earlier\n            if not earlier and", "            if", "tests/moe/test_waits.py",
    ),
    Mutant(
        "MoE: others are asked what they wait for", "aiotransfer/moe/handle.py",
        "                step.party.ask_who_waits()  # most calls end long before this\n", "", "tests/moe/test_waits.py",
    ),
    Mutant(
        "MoE: arguments that do not fit the call", "aiotransfer/moe/calls.py",
        "                await refuse(a2a, error)\n",
        "", "tests/moe/test_out_of_step.py",
    ),
    Mutant(
        "MoE: who speaks for a rank", "aiotransfer/moe/party.py",
        "or self._at(content.rank) is peer:",
        "or True:", "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: a reader goes on", "aiotransfer/moe/party.py",
        "        except Exception as error:\n            self._failed(peer, error)",
        "        except MemoryError as error:\n            self._failed(peer, error)", "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: views that cannot be", "aiotransfer/moe/party.py",
        "        if wrong and (self.rank,",
        "        if False and (self.rank,", "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: pieces of one message", "aiotransfer/moe/wire.py",
        "        if self._of != (piece.incarnation, piece.of) or piece.number != len(held):\n",
        "        if False:\n", "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: length of a message in pieces", "aiotransfer/moe/wire.py",
        "        if piece.of * PIECE > self._most + PIECE:\n",
        "        if False:\n", "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: ranks that are gone", "aiotransfer/moe/members.py",
        "return len(self._gone) + len(self._present) >= MOST_GONE",
        "return False", "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: a rank that cannot set up says so", "aiotransfer/moe/meeting.py",
        "            self._send_to(peer, unable)\n",
        "            pass\n", "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: the others know that a rank cannot set up", "aiotransfer/moe/party.py",
        "            self._know_it.add(rank)\n", "            pass\n", "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: that is acknowledged", "aiotransfer/moe/party.py",
        "            self._send_to(peer, wire.Heard(rank=self.rank, incarnation=self.incarnation))\n", "",
        "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: whose memory a Hello describes", "aiotransfer/moe/party.py",
        "        if region.incarnation != peer.incarnation:\n", "        if False:\n", "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: what an earlier incarnation said wrong", "aiotransfer/moe/party.py",
        "            if self.members.incarnation(content.rank) != content.incarnation:\n", "            if False:\n",
        "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: an earlier incarnation that leaves", "aiotransfer/moe/party.py",
        "if hello is not None and hello[1].incarnation == leave.incarnation:", "if True:", "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: a rank that leaves while the ranks meet", "aiotransfer/moe/party.py",
        "if hello is not None and hello[1].incarnation == leave.incarnation:", "if False:", "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: an all-to-all that cannot be made is told of", "aiotransfer/moe/unmade.py",
        "            _left_unmade(list(given), dict(named), error)\n", "", "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: one that is made answers for itself", "aiotransfer/moe/unmade.py",
        "if any(one.key == key and one.over is None for one in _made.get(engine, ())):", "if False:",
        "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: answers of one engine", "aiotransfer/moe/unmade.py",
        "    while len(there) >= MOST:\n", "    while False:\n", "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: lists that contradict each other", "aiotransfer/moe/meeting.py",
        "                self.group.check_lists()\n", "", "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: innocents of ranks that do not meet", "aiotransfer/moe/meeting.py",
        "        return silent or missing\n", "        return missing\n", "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: connected ranks are not dialled", "aiotransfer/moe/meeting.py",
        "                if rank not in found and (known := self._at(rank)) is not None:\n",
        "                if False and (known := self._at(rank)) is not None:\n", "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: whatever an argument raises", "aiotransfer/moe/alltoall.py",
        "            except BaseException as error:  # whatever it is", "            except (TypeError, ValueError) as error:  #",
        "tests/moe/test_out_of_step.py",
    ),
    Mutant(
        "MoE: a deadline that cannot be uses up the step", "aiotransfer/moe/alltoall.py",
        "            refusal, timeout = error, None\n", "            raise\n", "tests/moe/test_out_of_step.py",
    ),
    Mutant(
        "MoE: a first write that was not taken", "aiotransfer/moe/step.py",
        "            party.next_step = self.number\n            raise\n", "            raise\n", "tests/moe/test_out_of_step.py",
    ),
    Mutant(
        "MoE: digest of routing", "aiotransfer/moe/step.py",
        "elif any(mate.digest != head.digest for mate in mates):", "elif False:", "tests/moe/test_out_of_step.py",
    ),
    Mutant(
        "MoE: tags are compared", "aiotransfer/moe/step.py",
        "if len(tags := {head.tag for head in heads.values()}) > 1:", "tags = set(b'')\n        if len(tags) > 1:",
        "tests/moe/test_out_of_step.py",
    ),
    Mutant(
        "MoE: counts of a header", "aiotransfer/moe/buffers.py",
        "        if rows > self.tokens * shape.topk:\n", "        if False:\n", "tests/moe/test_out_of_step.py",
    ),
    Mutant(
        "MoE: sums over what is still read", "aiotransfer/moe/handle.py",
        "    if overlap(memory, stride, results, results_stride, shape.result_bytes):\n", "    if False:\n",
        "tests/moe/test_out_of_step.py",
    ),
    Mutant(
        "MoE: innocents in deadlines", "aiotransfer/moe/traffic.py",
        "if found := [r for r in waited if party.counter(kind, self.slot, r).value < expected[r]]:", "if found := waited:",
        "tests/moe/test_out_of_step.py",
    ),
    Mutant(
        "MoE: gradients that nobody gets", "aiotransfer/moe/tensors.py",
        'if getattr(array, "requires_grad", False) and', "if False and", "tests/moe/test_torch.py",
    ),
    Mutant(
        "moe: a reader outlives any exception of one message", "aiotransfer/moe/party.py",
        "                except Exception as error:  # an error of ours in one message: the next one may be another rank's\n"
        "                    self._failed(message.peer, error)\n", "", "tests/moe/test_identity.py",
    ),
)  # fmt: skip
