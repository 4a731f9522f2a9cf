"""The bounds of the convergence theory, rate constants, and estimates of L, σ² and Δ from runs."""
