"""What a person or a program sees of a run: logs, curves and pictures."""
