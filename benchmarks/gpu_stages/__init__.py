"""The stages of benchmarks/gpu.py, one module each; `stage.py` has their common parts."""
