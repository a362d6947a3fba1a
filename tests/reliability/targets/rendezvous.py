"""What other ranks wrote into a store."""

from __future__ import annotations

import json

from aiotransfer.errors import RendezvousError
from aiotransfer.rendezvous import roster
from tests.reliability.absurd import Target, alone

OWN = roster.Entry(0, 2, "127.0.0.1:7070", 5, "boot/4026531840")
OTHER = roster.Entry(1, 2, "127.0.0.1:7071", 6, "boot/4026531840")


def _addresses(data: bytes) -> bool:
    """The entry of rank 1, read by rank 0."""
    try:
        found = roster.addresses(OWN, [OWN.encode(), data])
    except RendezvousError:
        return False
    assert len(found) == 2
    return True


TARGETS = (
    Target("rendezvous", "another rank's entry in the store", lambda: [json.loads(OTHER.encode())],
           lambda tree: json.dumps(tree).encode(), alone(_addresses)),
)  # fmt: skip
