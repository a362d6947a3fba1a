"""Credits of messages: how much one side may send before the other has read.

Invariants: what is unread never exceeds the window that was granted; credit is given back in lumps of at
least a quarter of the window, or at once when the sender has less than one message left, so that a reader of
single messages does not answer each.
"""

from __future__ import annotations


class SendCredit:
    """What a sender may still send: `messages`, of `nbytes` in all."""

    def __init__(self, messages: int, nbytes: int) -> None:
        self.messages = messages
        self.nbytes = nbytes

    def take(self, nbytes: int) -> bool:
        """Use credit for one message; False when there is not enough."""
        if self.messages < 1 or self.nbytes < nbytes:
            return False
        self.messages -= 1
        self.nbytes -= nbytes
        return True

    def grant(self, messages: int, nbytes: int) -> None:
        """The other side gave credit back."""
        self.messages += messages
        self.nbytes += nbytes


class ReceiveCredit:
    """What a receiver has granted, of a window of `messages` and `nbytes`, and what it owes for what was
    read."""

    def __init__(self, messages: int, nbytes: int) -> None:
        self._window = messages, nbytes
        self._messages, self._nbytes = messages, nbytes  # what the sender has left
        self._owed_messages = self._owed_bytes = 0

    def arrived(self, nbytes: int) -> bool:
        """A message came; False when the sender had no credit for it."""
        self._messages -= 1
        self._nbytes -= nbytes
        return self._messages >= 0 and self._nbytes >= 0

    def consumed(self, nbytes: int) -> tuple[int, int] | None:
        """The application took one; (messages, bytes) to grant now, or None."""
        self._owed_messages += 1
        self._owed_bytes += nbytes
        enough = self._owed_messages * 4 >= self._window[0] or self._owed_bytes * 4 >= self._window[1]
        if not enough and self._nbytes >= 1 << 20 and self._messages > 1:
            return None
        grant = self._owed_messages, self._owed_bytes
        self._messages += grant[0]
        self._nbytes += grant[1]
        self._owed_messages = self._owed_bytes = 0
        return grant
