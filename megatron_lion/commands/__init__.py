"""The verbs of the command line, one module each: help line, flags and run(), which does the heavy imports."""
