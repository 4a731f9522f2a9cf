"""The colours of the optimizers, the same in every figure.

Okabe and Ito's palette: distinct for every common kind of colour vision, on white and (lightened) on black.
"""

OPTIMIZER_COLOURS = {"lion": "#0072B2", "sgd": "#D55E00", "adamw": "#009E73"}
