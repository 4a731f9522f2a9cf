"""Reads run folders and compares them; needs neither torch nor a model."""
