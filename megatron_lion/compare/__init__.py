"""Compares runs: tables, figures and an HTML report; needs neither torch nor a model."""
