"""What all ranks of an all-to-all must agree on: sizes, routing, messages, and who takes part. Pure."""
