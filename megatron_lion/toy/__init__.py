"""The two-dimensional problem on which both sides of the theorems are computed exactly."""
