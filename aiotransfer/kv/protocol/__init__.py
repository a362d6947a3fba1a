"""What both sides of a request must agree on: layouts, plans, checksums, messages, and how a request may end.
Pure."""
