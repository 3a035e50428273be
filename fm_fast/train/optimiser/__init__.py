"""The optimiser: AdamW with averages in one pass, how they forget, its stored states, and schedules of the learning rate."""
