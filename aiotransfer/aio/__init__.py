"""What all layers that wait share: deadlines that hold although the loop was blocked, tasks of the library,
limited log lines."""
