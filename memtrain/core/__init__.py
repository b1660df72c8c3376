"""Equations: pure functions of tensors; and what all rooms share. Needs torch and the standard library alone."""
