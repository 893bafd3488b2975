"""Holds the engine's own operators to their definitions in `kernels`: a program of its own, ``python -m``."""
