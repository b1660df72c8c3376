"""Tiny pipelines in hand, of both families."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from memtrain.audit.denoiser import Denoiser
from memtrain.demo.make_base import TEXT_WIDTH

PROMPTS = ["fox on a teal background", "<script>alert('x')</script>", "two-hump camel on a white background"]


@pytest.fixture(scope="session")
def denoiser(pipeline_folder) -> Denoiser:
    return Denoiser.load(str(pipeline_folder), device="cpu")


@pytest.fixture(scope="session")
def stock(denoiser) -> StableDiffusionPipeline:
    """The same weights behind the stock pipeline's own loop."""
    components = denoiser.pipeline.components
    components["scheduler"] = DDIMScheduler.from_config(denoiser.pipeline.scheduler.config, clip_sample=False)
    pipeline = StableDiffusionPipeline(**components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def xl_pipeline(denoiser) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL in small: two text encoders, pooled text, sizes; random weights."""
    base = denoiser.pipeline
    torch.manual_seed(0)
    text = {
        **base.text_encoder.config.to_dict(),
        "hidden_size": 64,
        "intermediate_size": 64,
        "projection_dim": 32,
    }
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=1,
        cross_attention_dim=TEXT_WIDTH + 64,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text)).eval(),
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer,
        unet=unet.eval(),
        scheduler=base.scheduler,
        add_watermarker=False,
    )
