"""Checkpoints whose matrices are rounded already: which of them are, in which scheme, and their codes."""
