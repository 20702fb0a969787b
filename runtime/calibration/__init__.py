"""Rounding of weights that heeds what they are multiplied with."""
