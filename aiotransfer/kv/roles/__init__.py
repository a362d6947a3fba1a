"""What a decoder and a prefiller are both made of: messages handed to them, memory for tails, checks and
spans."""
