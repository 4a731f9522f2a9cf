"""The run folder: paths, lock, settings, metrics, checkpoints and probe results; imports no torch."""
