"""Reproduces the paper's artefacts: plans and starts the runs, and compares the results with the paper."""
