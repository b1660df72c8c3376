"""Callbacks with the settings of a tiny run: few pictures, few steps."""

import numpy as np
from PIL import Image

from memtrain.callbacks.copies import Copies
from memtrain.callbacks.memorized_table import MemorizedTable
from memtrain.callbacks.validation import Validation


def validation(**options) -> Validation:
    defaults = dict(every=2, samples=6, timesteps_per_sample=4, high_noise=0.5, batch_size=5)
    return Validation(**(defaults | options))


def copies(**options) -> Copies:
    defaults = dict(every=0, watched=16, watched_images_per_prompt=1, num_images_per_prompt=2, reference=2,
                    num_inference_steps=2,
                    guidance_scale=2.0, max_rmse=0.5, false_copies=0.01, nearest=1000, min_repeats=1, batch_size=3,
                    shown=2)  # fmt: skip
    return Copies(**(defaults | options))


def table(**options) -> MemorizedTable:
    defaults = dict(every=0, samples=4, num_images_per_prompt=2, counted_from=0.3, num_inference_steps=2,
                    guidance_scale=2.0, max_rmse=0.5,
                    batch_size=8)  # fmt: skip
    return MemorizedTable(**(defaults | options))


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
