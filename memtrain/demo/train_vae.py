"""Trains the demo's AutoencoderKL on endless composites (a script, about ten minutes on two cores).

    python -m memtrain.demo.train_vae --out FOLDER

Writes a diffusers folder in fp32 safetensors, with the scaling factor that gives latents of unit variance,
and in it a picture of reconstructions (originals above, reconstructions below).
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.nn.functional import l1_loss, mse_loss
from torch.utils.data import DataLoader, Dataset

from memtrain.demo.compose import RESOLUTION, Composites

KL_WEIGHT = 1e-6
L1_WEIGHT = 0.5
CROP = 32  # pixels, side of what the first steps see
FIRST_LOG_VARIANCE = -6.0  # of the posterior
UNSEEN = 2**39  # first index of the composites that measure, far beyond those that train


class CompositePixels(Dataset):
    """The pictures of `Composites` at [start, start + length) as floats (3, 64, 64) in [-1, 1]."""

    def __init__(self, seed: int, start: int, length: int) -> None:
        self.composites, self.start, self.length = Composites(seed), start, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < self.length:
            raise IndexError(f"picture {index} of {self.length}")
        image = torch.from_numpy(self.composites[self.start + index].image)
        return image.permute(2, 0, 1) / 127.5 - 1  # (64, 64, 3) -> (3, 64, 64)


def untrained_vae() -> AutoencoderKL:
    """A small AutoencoderKL, not trained: pictures (3, 64, 64) to latents (4, 16, 16)."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=RESOLUTION,
        mid_block_add_attention=False,  # one object on a plain ground: convolutions see enough
    )
    # With diffusers' start, a variance near 1, noise drowns the latents: three of four channels stayed noisy
    # (log variance -3) after 1,800 steps, and colours and details were lost.
    vae.quant_conv.bias.data[vae.config.latent_channels :] = FIRST_LOG_VARIANCE
    return vae


def edges(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences of neighbouring pixels of (B, 3, H, W), down and across."""
    return images.diff(dim=2), images.diff(dim=3)


def vae_loss(vae: AutoencoderKL, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A batch's loss: L1 and L2 of the pixels, L2 of their differences (for edges), a faint pull towards N(0, 1)."""
    posterior = vae.encode(images).latent_dist
    reconstructed = vae.decode(posterior.sample(generator=generator)).sample
    edge_loss = sum(mse_loss(a, b) for a, b in zip(edges(reconstructed), edges(images), strict=True))
    pixel_loss = L1_WEIGHT * l1_loss(reconstructed, images) + mse_loss(reconstructed, images)
    return pixel_loss + edge_loss + KL_WEIGHT * posterior.kl().mean()


def train(vae: AutoencoderKL, steps: int, crop_steps: int, batch_size: int, learning_rate: float, seed: int) -> None:
    """Train the VAE in place with AdamW and a one-cycle rate; every picture is new.

    The first `crop_steps` see a quarter of each picture, at a quarter of the cost; the rest, at the low rates
    of the cycle, whole ones, whose statistics the norms meet in use.
    """
    pictures = DataLoader(CompositePixels(seed, 0, steps * batch_size), batch_size)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    generator, start = torch.Generator().manual_seed(seed), time.time()
    for step, images in enumerate(pictures, start=1):
        if step <= crop_steps:
            top, left = torch.randint(RESOLUTION - CROP + 1, (2,), generator=generator).tolist()
            images = images[:, :, top : top + CROP, left : left + CROP].contiguous()
        loss = vae_loss(vae, images, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.4f}  {time.time() - start:.0f} s", flush=True)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Pictures through the mode of the latents and back, clamped to [-1, 1]. (B, 3, 64, 64) -> the same"""
    return vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)


@torch.no_grad()
def latent_std(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Standard deviation of the latents of pictures (B, 3, 64, 64), over all channels and places."""
    return vae.encode(images).latent_dist.mode().std().item()


def psnr(images: torch.Tensor, reconstructed: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1], the mean over the pictures."""
    mean_square = (images - reconstructed).square().flatten(1).mean(dim=1)  # (B, 3, H, W) -> (B, 3 H W) -> (B,)
    return (10 * torch.log10(4 / mean_square)).mean().item()


def comparison(images: torch.Tensor, reconstructed: torch.Tensor, columns: int = 12) -> Image.Image:
    """Rows of originals, each above the row of its reconstructions, twice as large."""
    # two of (B, 3, H, W) -> (B, 2, 3, H, W) -> (rows, columns, 2, 3, H, W)
    pairs = torch.stack([images, reconstructed], dim=1).unflatten(0, (-1, columns))
    # -> (rows, 2, H, columns, W, 3) -> (rows 2 H, columns W, 3)
    grid = pairs.permute(0, 2, 4, 1, 5, 3).reshape(-1, columns * RESOLUTION, 3)
    pixels = ((grid + 1) * 127.5).round().numpy().astype(np.uint8)
    small = Image.fromarray(pixels)
    return small.resize((small.width * 2, small.height * 2), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's VAE.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4800)
    parser.add_argument("--crop-steps", type=int, default=4000, help="of these, on quarters of the pictures")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)  # the weights' initialisation in diffusers takes no generator
    vae = untrained_vae()
    train(vae, arguments.steps, arguments.crop_steps, arguments.batch_size, arguments.learning_rate, arguments.seed)
    vae.eval()
    unseen = torch.stack(list(CompositePixels(arguments.seed, UNSEEN, 480)))
    vae.register_to_config(scaling_factor=1 / latent_std(vae, unseen))
    vae.save_pretrained(arguments.out)
    reconstructed = reconstruct(vae, unseen)
    comparison(unseen[:48], reconstructed[:48]).save(arguments.out / "reconstructions.png")
    parameters = sum(weight.numel() for weight in vae.parameters())
    print(
        f"{parameters / 1e6:.2f} M parameters, scaling factor {vae.config.scaling_factor:.4f}, "
        f"PSNR {psnr(unseen, reconstructed):.2f} dB on {len(unseen)} unseen composites"
    )


if __name__ == "__main__":
    main()
