"""Sweeps over grids of settings: plans the runs, starts those that are missing, and chooses the best; no torch."""
