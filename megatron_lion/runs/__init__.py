"""What a run folder is: its paths, lock, settings, metrics, checkpoints and probes; needs no torch."""
