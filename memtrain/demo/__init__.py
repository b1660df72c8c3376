"""The embedded default: captioned images as shards, a tiny Stable Diffusion, how both were made."""
