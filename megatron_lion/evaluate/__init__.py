"""Zero-shot evaluation of checkpoints."""
