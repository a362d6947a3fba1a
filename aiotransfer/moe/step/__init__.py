"""One dispatch and its combine, on one rank."""
