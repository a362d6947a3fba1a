"""Where one side's weights lie: tensors, ranks, pieces, and the memory that they are bound to."""
