"""The training loop, the learning-rate schedule, checkpoints, resuming, and probes of saved checkpoints."""
