"""The records of a run: its folder, attempts, checkpoints and metrics."""
