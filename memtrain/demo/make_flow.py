"""Builds the demo's untrained Stable Diffusion 3 around the parts of a trained pipeline (a script, seconds).

    python -m memtrain.demo.make_flow --base memtrain/demo/pipeline --out FOLDER --seed 0

Writes a stock diffusers `StableDiffusion3Pipeline` folder in fp32 safetensors, without T5. VAE, tokenizer and first
text encoder are the base's. `memtrain train experiment=demo_flow_base` trains the transformer of it.
"""

import argparse
import copy
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from memtrain.demo.compose import Composites

ADAPTIVE_NORMS = (AdaLayerNormZero, AdaLayerNormContinuous)
HEAD_WIDTH = 32  # channels of an attention head
SECOND_TEXT_WIDTH = 32
UNSEEN = 1_000_000_000  # composites from here on are in no training
MEASURED = 480  # of them


@torch.no_grad()
def latent_mean_and_std(vae: AutoencoderKL, count: int) -> tuple[float, float]:
    """Of the latents of composites that no training sees, over all channels and places."""
    composites = Composites(0)
    pixels = torch.stack([torch.from_numpy(composites[UNSEEN + place].image) for place in range(count)])
    # (B, 64, 64, 3) uint8 -> (B, 3, 64, 64) in [-1, 1]
    latents = vae.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mode()
    return latents.mean().item(), latents.std().item()


def with_projection(encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """The same text encoder, whose pooled embedding is projected by the identity, (D, D)."""
    projected = CLIPTextModelWithProjection(encoder.config)
    weights = {
        f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in encoder.state_dict().items()
    }
    projected.load_state_dict(weights | {"text_projection.weight": torch.eye(encoder.config.hidden_size)})
    return projected


def second_text_encoder(config: CLIPTextConfig) -> CLIPTextModelWithProjection:
    """The smallest that the stock pipeline takes, with random weights: the network learns to live with it."""
    small = dict(
        hidden_size=SECOND_TEXT_WIDTH,
        intermediate_size=SECOND_TEXT_WIDTH,
        projection_dim=SECOND_TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return CLIPTextModelWithProjection(CLIPTextConfig(**config.to_dict() | small))


def untrained_transformer(width: int, layers: int, side: int, channels: int, text_width: int) -> SD3Transformer2DModel:
    """An MMDiT over patches of 2 x 2 latents, queries and keys normalised as in Stable Diffusion 3.5.

    Its blocks start as the identity (adaLN-zero, Peebles & Xie 2023), which stock initialisation does not see to.
    """
    transformer = SD3Transformer2DModel(
        sample_size=side,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=layers,
        num_attention_heads=width // HEAD_WIDTH,
        attention_head_dim=HEAD_WIDTH,
        caption_projection_dim=width,
        joint_attention_dim=text_width,
        pooled_projection_dim=text_width,
        pos_embed_max_size=side // 2,
        qk_norm="rms_norm",
    )
    modulations = [norm.linear for norm in transformer.modules() if isinstance(norm, ADAPTIVE_NORMS)]
    for linear in (*modulations, transformer.proj_out):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return transformer


def untrained_flow(base: StableDiffusionPipeline, width: int, layers: int, seed: int) -> StableDiffusion3Pipeline:
    """The pipeline around the parts of a trained one; the VAE's latents are brought to mean 0 and deviation 1."""
    torch.manual_seed(seed)  # the weights' initialisation takes no generator
    mean, std = latent_mean_and_std(base.vae, MEASURED)
    base.vae.register_to_config(shift_factor=mean, scaling_factor=1 / std)
    first = with_projection(base.text_encoder)
    text_width = first.config.hidden_size + SECOND_TEXT_WIDTH
    side, channels = base.unet.config.sample_size, base.vae.config.latent_channels
    return StableDiffusion3Pipeline(
        transformer=untrained_transformer(width, layers, side, channels, text_width),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),  # its latents are small: no more noise than is drawn
        vae=base.vae,
        text_encoder=first,
        tokenizer=base.tokenizer,
        text_encoder_2=second_text_encoder(first.config),
        tokenizer_2=copy.deepcopy(base.tokenizer),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the demo's untrained Stable Diffusion 3.")
    parser.add_argument("--base", type=Path, required=True, help="the demo's Stable Diffusion, trained")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=128, help="a multiple of 32")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    base = StableDiffusionPipeline.from_pretrained(arguments.base, local_files_only=True, safety_checker=None)
    pipeline = untrained_flow(base.to(torch.float32), arguments.width, arguments.layers, arguments.seed)
    pipeline.save_pretrained(arguments.out)
    total = 0
    for name in ("vae", "text_encoder", "text_encoder_2", "transformer"):
        parameters = sum(weight.numel() for weight in getattr(pipeline, name).parameters())
        total += parameters
        print(f"{name}: {parameters / 1e6:.2f} M parameters")
    scaled = f"latents (x - {pipeline.vae.config.shift_factor:.4f}) * {pipeline.vae.config.scaling_factor:.4f}"
    print(f"{scaled}; {total / 1e6:.2f} M parameters, {total * 2 / 1e6:.1f} MB in fp16: {arguments.out}")


if __name__ == "__main__":
    main()
