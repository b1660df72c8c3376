"""A stock Stable Diffusion pipeline's weights under the names that they had before diffusers."""

import re

from diffusers import StableDiffusionPipeline
from torch import Tensor

_RESNETS = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
            "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
_UNET = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
         "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
         "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
         "mid_block.resnets.1": "middle_block.2"}  # fmt: skip
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def original_layout(pipeline: StableDiffusionPipeline) -> dict[str, Tensor]:
    """UNet, VAE and CLIP as one file of CompVis' layout has them."""
    unet, vae, text = (part.state_dict() for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder))
    return {
        **{f"model.diffusion_model.{_unet_name(name, pipeline)}": value for name, value in unet.items()},
        **{f"first_stage_model.{_vae_name(name, pipeline)}": _vae_value(name, value) for name, value in vae.items()},
        **{f"cond_stage_model.transformer.text_model.{name}": value for name, value in text.items()},
    }


def _renamed(name: str, names: dict[str, str]) -> str:
    for new, old in names.items():
        name = re.sub(rf"(^|\.){re.escape(new)}\.", rf"\g<1>{old}.", name, count=1)
    return name


def _unet_name(name: str, pipeline: StableDiffusionPipeline) -> str:
    row = pipeline.unet.config.layers_per_block + 1
    blocks = pipeline.unet.config.up_block_types
    if found := re.match(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.(.*)", name):
        block, kind, layer, rest = int(found[1]), found[2], int(found[3]), found[4]
        if kind == "downsamplers":
            return f"input_blocks.{row * (block + 1)}.0.{rest.replace('conv', 'op')}"
        rest = _renamed(rest, _RESNETS) if kind == "resnets" else rest
        return f"input_blocks.{row * block + layer + 1}.{int(kind == 'attentions')}.{rest}"
    if found := re.match(r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\.(.*)", name):
        block, kind, layer, rest = int(found[1]), found[2], int(found[3]), found[4]
        if kind == "upsamplers":
            return f"output_blocks.{row * block + row - 1}.{1 + ('Attn' in blocks[block])}.{rest}"
        rest = _renamed(rest, _RESNETS) if kind == "resnets" else rest
        return f"output_blocks.{row * block + layer}.{int(kind == 'attentions')}.{rest}"
    is_resnet = name.startswith("mid_block.resnets")
    return _renamed(_renamed(name, _RESNETS) if is_resnet else name, _UNET)


def _vae_name(name: str, pipeline: StableDiffusionPipeline) -> str:
    last = len(pipeline.vae.config.block_out_channels) - 1
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda found: f"up.{last - int(found[1])}.block.", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda found: f"up.{last - int(found[1])}.upsample.", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)\.", lambda found: f"mid.block_{int(found[1]) + 1}.", name)
    if "mid_block.attentions.0." in name:
        return _renamed(name.replace("mid_block.attentions.0.", "mid.attn_1."), _ATTENTION)
    return _renamed(name, {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut"})


def _vae_value(name: str, value: Tensor) -> Tensor:
    """Attention's linear layers were convolutions of 1 x 1."""
    return value[..., None, None] if re.search(r"attentions\.0\.to_.*weight", name) else value
