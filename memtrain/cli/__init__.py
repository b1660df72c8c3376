"""Reads config, builds objects, calls one room."""
