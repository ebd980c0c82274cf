"""Weights in groups of 4 or 8 bits: the definition, linear maps and experts that keep them, rounding to them."""
