"""The stages of benchmarks/gpu.py, one module each; `stage.py` holds what they share."""
