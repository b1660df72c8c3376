"""Tiny pipelines in hand, of both families."""

from pathlib import Path

import pytest
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

from memtrain.audit.denoiser import Denoiser
from tests.support.families import stable_diffusion, stable_diffusion_xl

PROMPTS = ["fox on a teal background", "<script>alert('x')</script>", "two-hump camel on a white background"]


@pytest.fixture(scope="session")
def pipeline_folder(deep_folder) -> Path:
    return deep_folder


@pytest.fixture(scope="session")
def pipeline(pipeline_folder) -> StableDiffusionPipeline:
    return stable_diffusion(pipeline_folder)


@pytest.fixture(scope="session")
def denoiser(pipeline) -> Denoiser:
    return Denoiser.of(pipeline)


@pytest.fixture(scope="session")
def stock(pipeline) -> StableDiffusionPipeline:
    """The same weights behind the stock pipeline's own loop."""
    components = pipeline.components
    components["scheduler"] = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    stock = StableDiffusionPipeline(**components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    return stock


@pytest.fixture(scope="session")
def xl_pipeline(pipeline) -> StableDiffusionXLPipeline:
    return stable_diffusion_xl(pipeline)
