"""What is told of an update: its record, its progress and its spans."""
