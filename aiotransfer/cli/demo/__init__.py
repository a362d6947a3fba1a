"""`demo`: a language model whose KV cache crosses from prefill processes to a decode process, and where the
model comes from."""
