"""Weight transfer for vLLM on `aiotransfer.weights`: whole versions come into host memory while the engine
goes on, and are then loaded between two of its steps."""
