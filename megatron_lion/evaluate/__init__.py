"""Zero-shot evaluation of checkpoints on WikiText, LAMBADA and other texts, and text sampling."""
