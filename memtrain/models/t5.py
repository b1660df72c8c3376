"""What a network is told after the end of a T5's caption."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import T5EncoderModel

if TYPE_CHECKING:
    from memtrain.models.base import DiffusionModel

PADDINGS = ("encoded", "zero")


def set_t5_padding(model: DiffusionModel, padding: str) -> None:
    """Say what stands for padding in a model's captions: `encoded`, as in the stock pipeline, or `zero`.

    Raises:
        ValueError: another word, or `zero` where there is no T5.
    """
    if padding not in PADDINGS:
        raise ValueError(f"t5_padding must be one of {', '.join(PADDINGS)}, got {padding}")
    if padding == "encoded":
        return
    encoders = [getattr(model, name) for name in model.text_encoder_names]
    t5 = [encoder for encoder in encoders if isinstance(encoder, T5EncoderModel)]
    if not t5:
        raise ValueError(f"t5_padding={padding} is for a model with a T5, which this {type(model).__name__} lacks")
    for encoder in t5:
        pad_with_zeros(encoder)
    model.t5_padding = padding


def pad_with_zeros(encoder: T5EncoderModel) -> None:
    """Have a T5 look at a caption's own tokens alone, and give zeros in the place of padding, whoever calls it.

    The stock pipelines of Stable Diffusion 3 and Flux give it no attention mask, so that its tokens depend on how far
    a caption is padded, and what stands for padding on the caption. A pipeline that this encoder is in draws
    accordingly from then on.
    """
    padding = encoder.config.pad_token_id

    def look_at_the_caption(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        ids = args[0] if args else kwargs["input_ids"]  # (B, L)
        return args, {**kwargs, "attention_mask": ids.ne(padding).long()}

    def give_zeros(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * kwargs["attention_mask"].unsqueeze(-1)  # (B, L, D)
        return output

    encoder.register_forward_pre_hook(look_at_the_caption, with_kwargs=True)
    encoder.register_forward_hook(give_zeros, with_kwargs=True)
