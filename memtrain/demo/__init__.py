"""The embedded default: captioned images as shards, a tiny Stable Diffusion and a tiny Stable Diffusion 3, how all of
it was made."""

from pathlib import Path

PIPELINE = Path(__file__).with_name("pipeline")  # the tiny Stable Diffusion, as a diffusers folder
FLOW = Path(__file__).with_name("flow")  # the tiny Stable Diffusion 3, likewise
