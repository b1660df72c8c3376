"""Hydra configs: a file per choice. Lies inside the package once installed."""
