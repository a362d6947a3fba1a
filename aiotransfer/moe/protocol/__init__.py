"""What all ranks of an all-to-all must agree on: sizes, routing, messages, and membership. Pure."""
