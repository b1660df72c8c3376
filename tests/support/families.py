"""A tiny stock pipeline of each model family."""

import copy
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

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
    vae = _shifted_vae(levels=4, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609)
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
    _stir(transformer)
    encoder, tokenizer = _t5(TEXT_WIDTH + 80) if t5 else (None, None)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler)),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**text)).eval(),
        tokenizer=base.tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**wide)).eval(),
        tokenizer_2=copy.deepcopy(base.tokenizer),
        text_encoder_3=encoder,
        tokenizer_3=tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flux(base: StableDiffusionPipeline, guidance_embeds: bool = True, **scheduler) -> FluxPipeline:
    """A CLIP, a T5, a transformer of one block of each kind; random weights. Dev, or schnell, told of no guidance."""
    torch.manual_seed(0)
    encoder, tokenizer = _t5(16)
    clip = base.text_encoder.config.to_dict() | {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    dynamic = dict(shift=3.0, use_dynamic_shifting=True) if guidance_embeds else dict(shift=1.0)
    pipeline = FluxPipeline(
        transformer=_stir(
            FluxTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=1,
                joint_attention_dim=16,
                pooled_projection_dim=16,
                guidance_embeds=guidance_embeds,
                axes_dims_rope=(4, 6, 6),
            )
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**(dynamic | scheduler)),
        vae=_shifted_vae(latent_channels=4, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=CLIPTextModel(CLIPTextConfig(**clip)).eval(),
        tokenizer=base.tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flux2_klein(base: StableDiffusionPipeline, is_distilled: bool = False) -> Flux2KleinPipeline:
    """A language model as deep as the layers that are looked at, a transformer of one block of each kind; random."""
    torch.manual_seed(0)
    tokenizer = _words("<|im_start|>", "<|im_end|>", "user", "assistant")
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}<|im_start|>assistant\n"
    )
    text = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=27, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(latent_channels=2, **_small_vae()).eval()
    torch.nn.init.normal_(vae.bn.running_mean)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    transformer = Flux2Transformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=_stir(Qwen3ForCausalLM(text), std=0.3),
        tokenizer=tokenizer,
        transformer=_stir(transformer, std=0.3),
        is_distilled=is_distilled,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _shifted_vae(levels: int = 2, **options) -> AutoencoderKL:
    return AutoencoderKL(use_quant_conv=False, use_post_quant_conv=False, **_small_vae(levels), **options).eval()


def _small_vae(levels: int = 2) -> dict:
    """A VAE whose latents are 2^(levels - 1) times smaller than a picture, of 16 px untold."""
    return dict(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
    )


def _stir(network: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    """Weights everywhere: a transformer's last layers start at zero, and nothing would be predicted."""
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=std)
    return network.eval()


def _t5(width: int) -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """A T5 over words; those that it does not know are all one."""
    tokenizer = _words()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval(), tokenizer


def _words(*more: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a few words; those that it does not know are all one."""
    words = ["<pad>", "</s>", "<unk>", "fox", "on", "a", "teal", "background", "camel", *more]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=[word for word in more if "|" in word], **special
    )


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
