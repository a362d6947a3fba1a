"""Other engines: how they are reached, watched, lost and found again. They know no memory of ours."""
