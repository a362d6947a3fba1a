"""The prefill side: what was asked for, what has been offered, and the writes that bring it."""
