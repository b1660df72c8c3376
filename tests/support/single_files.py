"""Weights of stock pipelines under the names that they had before diffusers."""

import re

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

_RESNETS = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
            "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
_UNET = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
         "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
         "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
         "mid_block.resnets.1": "middle_block.2", "add_embedding.linear_1": "label_emb.0.0",
         "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


_OPEN_CLIP = {"encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "fc1": "c_fc",
              "fc2": "c_proj", "self_attn": "attn", "final_layer_norm": "ln_final",
              "embeddings.token_embedding": "token_embedding"}  # fmt: skip


def original_layout(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    """UNet, VAE and text encoders as one file of CompVis' layout, of XL Stability's, has them."""
    unet, vae, text = (part.state_dict() for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder))
    is_xl = hasattr(pipeline, "text_encoder_2")
    clip = "conditioner.embedders.0" if is_xl else "cond_stage_model"
    named = {
        **{f"model.diffusion_model.{_unet_name(name, pipeline)}": value for name, value in unet.items()},
        **{f"first_stage_model.{_vae_name(name, pipeline)}": _vae_value(name, value) for name, value in vae.items()},
        **{f"{clip}.transformer.text_model.{name}": value for name, value in text.items()},
        **(_open_clip(pipeline.text_encoder_2.state_dict()) if is_xl else {}),
    }
    return {name: value.contiguous() for name, value in named.items()}


def _open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value are one matrix there, the projection is transposed."""
    prefix = "conditioner.embedders.1.model."
    found = {f"{prefix}text_projection": state["text_projection.weight"].T}
    for name, value in state.items():
        if ".k_proj." in name or ".v_proj." in name or name == "text_projection.weight":
            continue
        named = _renamed(name.removeprefix("text_model."), _OPEN_CLIP)
        if named == "embeddings.position_embedding.weight":
            named = "positional_embedding"
        if ".q_proj." in name:
            value = torch.cat([state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            named = named.replace("q_proj.", "in_proj_")
        found[prefix + named] = value
    return found


def _renamed(name: str, names: dict[str, str]) -> str:
    for new, old in names.items():
        name = re.sub(rf"(^|\.){re.escape(new)}\.", rf"\g<1>{old}.", name, count=1)
    return name


def _unet_name(name: str, pipeline: DiffusionPipeline) -> str:
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


def _vae_name(name: str, pipeline: DiffusionPipeline) -> str:
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
