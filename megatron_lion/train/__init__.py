"""The training loop, schedules, checkpoints and metrics."""
