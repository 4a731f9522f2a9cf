"""The bounds of the convergence theory, rate constants and the two-dimensional toy problem."""
