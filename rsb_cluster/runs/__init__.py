"""What is kept of a run: its folder, its attempts, checkpoints and metrics."""
