"""The exponent of r = ‖∇f‖₁/‖∇f‖₂ over a family of models: trains and measures the family, and fits log r against log d; no torch."""
