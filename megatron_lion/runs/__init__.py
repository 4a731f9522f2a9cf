"""The run folder: paths, lock, settings, metrics, checkpoints and probe results; torch only for TensorBoard."""
