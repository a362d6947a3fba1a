"""`doctor`: what this machine offers, what it lacks and what to do about it, from its files and from what was
tried."""
