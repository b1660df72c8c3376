"""Equations: pure functions of tensors. Needs torch and the standard library alone."""
