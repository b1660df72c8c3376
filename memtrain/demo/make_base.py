"""Builds the demo's untrained Stable Diffusion around a trained VAE (a script, seconds).

    python -m memtrain.demo.make_base --vae FOLDER --out FOLDER --seed 0

Writes a stock diffusers `StableDiffusionPipeline` folder in fp32 safetensors. `memtrain train
experiment=demo_base` trains the UNet and the text encoder of it.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from memtrain.demo.compose import BACKGROUNDS, caption_of, load_glyphs

VOCABULARY = 2048  # tokens
MAX_TOKENS = 24  # of a caption, start and end included
TEXT_WIDTH = 128
HEAD_WIDTH = 16  # channels of an attention head; far fewer are several times slower on a CPU
WORD_END = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"


def all_captions() -> list[str]:
    """Every caption that a composite can have."""
    return [caption_of(name, background) for name in load_glyphs().names for background in BACKGROUNDS]


def caption_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer (byte-level BPE, lower case) of VOCABULARY tokens, merges learnt from the captions.

    Every byte has a token, inside a word and at its end, so that no text is unknown. Start and end come last,
    as in CLIP, and the end pads.
    """
    clip = CLIPTokenizer().backend_tokenizer  # empty; it splits text as the finished tokenizer will
    learner = Tokenizer(BPE(end_of_word_suffix=WORD_END))
    learner.normalizer, learner.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    letters = sorted(ByteLevel.alphabet())
    learner.train_from_iterator(
        captions,
        BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=letters, end_of_word_suffix=WORD_END, show_progress=False),
    )
    letters += [letter + WORD_END for letter in letters]
    merges = json.loads(learner.to_str())["model"]["merges"][: VOCABULARY - len(letters) - 2]
    tokens = [*letters, *("".join(pair) for pair in merges), START, END]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    return CLIPTokenizer(vocabulary, [tuple(pair) for pair in merges], model_max_length=MAX_TOKENS)


def untrained_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of width TEXT_WIDTH: input_ids (B, MAX_TOKENS) to (B, MAX_TOKENS, TEXT_WIDTH)."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def untrained_unet(widths: tuple[int, ...], sample_size: int, latent_channels: int) -> UNet2DConditionModel:
    """A UNet with attention at every resolution but the highest, where it would cost half of the step.

    `widths` are multiples of 16.
    """
    crossings = len(widths) - 1
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=widths,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * crossings,
        up_block_types=("CrossAttnUpBlock2D",) * crossings + ("UpBlock2D",),
        layers_per_block=1,
        # what diffusers calls attention_head_dim is the number of heads in this class
        attention_head_dim=tuple(width // HEAD_WIDTH for width in widths),
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )


def untrained_pipeline(vae: AutoencoderKL, widths: tuple[int, ...], seed: int) -> StableDiffusionPipeline:
    """The pipeline around the VAE; with Stable Diffusion's noise schedule, and without safety checker."""
    torch.manual_seed(seed)  # the weights' initialisation takes no generator
    tokenizer = caption_tokenizer(all_captions())
    sample_size = vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=untrained_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=untrained_unet(widths, sample_size, vae.config.latent_channels),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the demo's untrained Stable Diffusion around a VAE.")
    parser.add_argument("--vae", type=Path, required=True, help="folder written by train_vae")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--widths", type=int, nargs="+", default=[48, 64, 128], help="multiples of 16")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    vae = AutoencoderKL.from_pretrained(arguments.vae, local_files_only=True)
    pipeline = untrained_pipeline(vae, tuple(arguments.widths), arguments.seed)
    pipeline.save_pretrained(arguments.out)
    total = 0
    for name in ("vae", "text_encoder", "unet"):
        parameters = sum(weight.numel() for weight in getattr(pipeline, name).parameters())
        total += parameters
        print(f"{name}: {parameters / 1e6:.2f} M parameters")
    print(f"{total / 1e6:.2f} M parameters, {total * 2 / 1e6:.1f} MB in fp16: {arguments.out}")


if __name__ == "__main__":
    main()
