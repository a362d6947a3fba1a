"""Values: what the other layers say to each other. No I/O, no clock, no event loop."""
