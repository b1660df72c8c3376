"""The embedded default: captioned images as shards, a tiny Stable Diffusion, how both were made."""

from pathlib import Path

PIPELINE = Path(__file__).with_name("pipeline")  # the tiny Stable Diffusion, as a diffusers folder
