"""The ground of an engine: its state, loop and lane, the checks at the door, and what the lane reports."""
