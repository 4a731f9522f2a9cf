"""Grids of runs that are tuned alike: what they are, which are missing, and which is best; needs no torch."""
