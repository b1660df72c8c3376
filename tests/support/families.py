"""A tiny stock pipeline of each model family."""

import copy
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from memtrain.demo.make_base import TEXT_WIDTH


def stable_diffusion(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stable_diffusion_xl(base: StableDiffusionPipeline, **options) -> StableDiffusionXLPipeline:
    """Two text encoders, pooled text, sizes; random weights, beside the VAE and first text encoder of a smaller one."""
    torch.manual_seed(0)
    text = base.text_encoder.config.to_dict() | {"hidden_size": 64, "intermediate_size": 64, "projection_dim": 32}
    unet = UNet2DConditionModel(
        sample_size=4,
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
    pipeline = StableDiffusionXLPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text)).eval(),
        tokenizer=base.tokenizer,
        tokenizer_2=copy.deepcopy(base.tokenizer),
        unet=unet.eval(),
        scheduler=base.scheduler,
        add_watermarker=False,
        **options,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stable_diffusion_3(base: StableDiffusionPipeline, t5: bool = False, **scheduler) -> StableDiffusion3Pipeline:
    """Two CLIPs, maybe a T5, a transformer and a VAE of 16 channels with a shift; random weights."""
    torch.manual_seed(0)
    text = base.text_encoder.config.to_dict() | {"projection_dim": 16}
    wide = text | {"hidden_size": 64, "intermediate_size": 64, "projection_dim": 24}
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH + 80,
        caption_projection_dim=32,
        pooled_projection_dim=16 + 24,
        out_channels=16,
        pos_embed_max_size=16,
    )
    for parameter in transformer.parameters():  # its last layers start at zero: nothing would be predicted
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    encoder, tokenizer = _t5(TEXT_WIDTH + 80) if t5 else (None, None)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler)),
        vae=vae.eval(),
        text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**text)).eval(),
        tokenizer=base.tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**wide)).eval(),
        tokenizer_2=copy.deepcopy(base.tokenizer),
        text_encoder_3=encoder,
        tokenizer_3=tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _t5(width: int) -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """A T5 over words; those that it does not know are all one."""
    words = ["<pad>", "</s>", "<unk>", "fox", "on", "a", "teal", "background", "camel"]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    config = T5Config(vocab_size=len(words), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return T5EncoderModel(config).eval(), PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def state_of(pipeline: DiffusionPipeline) -> dict[str, object]:
    """All of a pipeline that something could change: weights, modes, hooks, configs, and which objects it holds."""
    state: dict[str, object] = {"components": {name: id(part) for name, part in pipeline.components.items()}}
    state["configs"] = {
        name: dict(part.config) if isinstance(part.config, dict) else part.config.to_dict()
        for name, part in pipeline.components.items()
        if hasattr(part, "config")
    }
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            state[f"{name} weights"] = {key: value.clone() for key, value in part.state_dict().items()}
            state[f"{name} layout"] = {
                key: (id(weight), weight.dtype, weight.requires_grad, weight.grad, weight.stride())
                for key, weight in part.named_parameters()
            }
            state[f"{name} modes"] = {key: module.training for key, module in part.named_modules()}
            state[f"{name} hooks"] = [
                len(hooks)
                for module in part.modules()
                for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
            ]
    return state


def assert_unchanged(pipeline: DiffusionPipeline, before: dict[str, object]) -> None:
    after = state_of(pipeline)
    assert after.keys() == before.keys()
    for name, state in before.items():
        if name.endswith(" weights"):
            assert all(torch.equal(value, after[name][key]) for key, value in state.items()), name
        else:
            assert after[name] == state, name
