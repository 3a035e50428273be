"""One module an op: its inputs, providers and correctness gate."""
