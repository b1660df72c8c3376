"""Shows that a change leaves every weight, loss, score and ledger row equal, bit for bit (a script, minutes).

    python tests/bitwise.py record OUT        # at the top of a checkout: trains and audits with its memtrain
    python tests/bitwise.py compare A B       # which tensors differ; exits with 1 where one does

`record` makes a fixed set of small runs through the command line and writes OUT/NAME.safetensors for each: every
number and every text that the run left in its folder, whatever the file, by file and column; text as UTF-8. What
tells the time or names a folder of the machine is left out. A tensor that only has another name in B is the same.
Record A and B on the same machine: other processors round otherwise.
"""

from __future__ import annotations

import os

os.environ |= {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TRANSFORMERS_VERBOSITY": "error",
}  # fmt: skip

import argparse
import contextlib
import importlib
import io
import json
import re
import shutil
import socket
import sys
import tarfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.numpy import save_file
from support.recording import compare, kept

sys.path[0] = os.getcwd()  # in place of tests/: memtrain is that of this checkout


# ---- what is trained on, and what is trained


def write_pipeline(folder: Path, prediction_type: str) -> None:
    """An untrained Stable Diffusion of a few thousand weights, with the demo's tokenizer and text encoder."""
    import memtrain

    torch.manual_seed(0)
    demo = StableDiffusionPipeline.from_pretrained(
        Path(memtrain.__file__).parent / "demo" / "pipeline", local_files_only=True, dtype=torch.float32
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=1,  # what diffusers calls so is the number of heads
        cross_attention_dim=demo.text_encoder.config.hidden_size,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=demo.text_encoder, tokenizer=demo.tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def write_xl_pipeline(folder: Path) -> None:
    """An untrained Stable Diffusion XL around the other one's parts."""
    from tests.support.families import stable_diffusion, stable_diffusion_xl

    stable_diffusion_xl(stable_diffusion(Path("pipeline"))).save_pretrained(folder)


def write_shards(folder: Path, shapes: list[tuple[int, int]], per_shard: int = 16, repeated: int = 0) -> None:
    """Smooth random pictures of these sizes, in turn; the first `repeated` come once more, as they are and smaller."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(5)
    pictures = []
    for number in range(48):
        coarse = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        pictures.append((coarse.resize(shapes[number % len(shapes)], Image.Resampling.BICUBIC), number))
    for number in range(repeated):
        picture = pictures[number][0]
        copies = [(picture, number), (picture.resize((90, 90), Image.Resampling.LANCZOS), number)]
        pictures[10 + 7 * number : 10 + 7 * number] = copies
    words = ["fox", "owl", "tree", "boat", "lamp", "shoe", "star", "moon"]
    for first in range(0, len(pictures), per_shard):
        with tarfile.open(folder / f"{first // per_shard:05d}.tar", "w") as tar:
            for row, (picture, number) in enumerate(pictures[first : first + per_shard], first):
                captions = [f"{words[number % 8]} {word} {number}" for word in ("on a red field", "in the sea", "")]
                encoded = io.BytesIO()
                picture.save(encoded, "JPEG", quality=92)
                said = json.dumps({"all_captions": captions, "number": number, "punsafe": number / 48})
                for end, data in (("jpg", encoded.getvalue()), ("txt", captions[0].encode()), ("json", said.encode())):
                    info = tarfile.TarInfo(f"{row:09d}.{end}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


# ---- the runs

STEPS = 10
BRIEFLY = [
    "experiment=demo_noto", "model.pretrained=pipeline", "runs_dir=.", "name=runs", "logger=csv", "trainer=cpu",
    f"trainer.max_steps={STEPS}", "data.shards=shards", "data.batch_size=8", "data.resolution=64", "data.num_workers=0",
    "optimizer.warmup_steps=2", "canaries.count=4", "canaries.repeats=6", "canaries.sacrificed=1",
    "reference.count=12", "reference.batch_size=8", "reference.every=2", "ema.decay=0.9",
    "callbacks.validation.every=5", "callbacks.validation.samples=8", "callbacks.validation.timesteps_per_sample=3",
    "callbacks.curves.every=2", "callbacks.checkpoint.every=5", "callbacks.progress=null", "callbacks.report=null",
    "callbacks.copies.every=5", "callbacks.copies.num_images_per_prompt=2", "callbacks.copies.reference=4",
    "callbacks.copies.num_inference_steps=2", "callbacks.sample_grid=null",
    "callbacks.memorized_table.num_inference_steps=2", "callbacks.memorized_table.samples=4",
]  # fmt: skip
UNWATCHED = ["callbacks.copies=null", "callbacks.memorized_table=null", "callbacks.export=null"]
QUICK = {  # exclusions within ten steps
    "none": [],
    "fixed": ["exclusion.threshold=0.5"],
    "normalized": ["exclusion.threshold=0.02"],
    "quantile": [
        "exclusion.quantile=0.3", "exclusion.half_life=8", "exclusion.warmup=2", "exclusion.num_bins=2",
    ],
    "calibrated": ["exclusion.false_positive_rate=0.2", "exclusion.warmup=4", "exclusion.num_bins=2"],
    "iet_agc": ["exclusion.ratio=1.02", "exclusion.warmup=2", "exclusion.num_bins=2"],
    "evidence": ["exclusion.warmup=2", "exclusion.num_bins=2", "exclusion.false_positive_rate=0.5"],
    "evidence_by_magnitude": ["exclusion.warmup=2", "exclusion.num_bins=2", "exclusion.false_positive_rate=0.5"],
    "z_scores": [
        "exclusion.warmup=2", "exclusion.num_bins=2", "exclusion.enter=0.1", "exclusion.leave=0.05",
        "exclusion.min_timestep=0.3",
    ],
}  # fmt: skip


def ruled(rule: str, *more: str) -> list[str]:
    return [f"exclusion={rule}", *QUICK[rule], *more]


RUNS = {
    **{f"rule_{rule}": ruled(rule) for rule in ("none", "fixed", "calibrated", "evidence", "z_scores")},
    **{f"rule_{rule}": ruled(rule, *UNWATCHED) for rule in ("normalized", "quantile", "evidence_by_magnitude")},
    "rule_agc": ruled("iet_agc", *UNWATCHED),  # as older recordings call it
    **{
        f"method_{name}": ruled("fixed", f"method={name}", "method.probability=0.7", *UNWATCHED)
        for name in ("random_caption", "random_tokens_added", "random_tokens_replaced", "words_repeated")
    },
    "method_embedding_noise": ruled("fixed", "method=embedding_noise", *UNWATCHED),
    "method_several_captions": ruled("fixed", "method=several_captions", *UNWATCHED),
    "v_prediction": ["exclusion=fixed", "exclusion.threshold=0.2", "model.pretrained=v_pipeline"],
    "xl": ruled(
        "evidence", "model=stable_diffusion_xl", "model.pretrained=xl_pipeline", "model.train_text_encoder=true",
        "data.shards=wide", "data.crop=random", "data.flip=0.5",
    ),
    "min_snr": ruled("fixed", "loss.min_snr_gamma=5", "loss.denominator=all", *UNWATCHED),
    "noise_offset": ruled("fixed", "loss.noise_offset=0.1", *UNWATCHED),
    "accumulation": ruled("evidence", "data.batch_size=4", "trainer.accumulate_grad_batches=2", *UNWATCHED),
    "scored_every_second_step": ruled("fixed", "score.every=2", *UNWATCHED),
    "scored_every_second_visit": ruled("evidence", "score.every_visits=2", "score.timesteps=[200,1000]", *UNWATCHED),
    "not_scored": ruled("iet_agc", "score.every=0", *UNWATCHED),
    "buckets": ruled("evidence", "data.shards=wide", "data.max_aspect_ratio=2", "data.bucket_multiple=16", *UNWATCHED),
    "views": ruled(
        "fixed", "data.crop=random", "data.flip=0.5", "data.caption=all_captions", "data.where='punsafe < 0.9'",
        "data.num_workers=1", *UNWATCHED,
    ),
    "all_weights": ruled(
        "fixed", "model.train_text_encoder=true", "model.gradient_checkpointing=true", "optimizer.schedule=constant",
        *UNWATCHED,
    ),
    "natural": ruled("evidence", "data.shards=natural", "canaries.repeats=null", "canaries.count=3"),
    "exact": ruled("z_scores", "data.shards=natural", "data.duplicates=exact", *UNWATCHED),
    "cached": ruled("evidence", "data.cache=latents", "data.flip=0.5", *UNWATCHED),
    "lora": ruled(
        "evidence", "adapter=lora", "adapter.rank=4", "adapter.text_encoder=true", "adapter.formats=[diffusers,kohya]",
        "callbacks.copies=null", "callbacks.memorized_table=null",
    ),
    "two_ranks": ruled("evidence", "data.batch_size=4"),
    "resumed": ruled("evidence", f"trainer.max_steps={STEPS + 5}", "resume.allow=all"),
}  # fmt: skip
MODEL, LIST = "runs/rule_evidence/export", "runs/rule_evidence/canaries.csv"
AUDITS = {
    "cache": [[
        "cache", "data.shards=shards", "data.resolution=64", "data.batch_size=8", "data.num_workers=0", "data.flip=0.5",
        "model.pretrained=pipeline", "out=OUT",
    ]],
    "detect": [[
        "detect", f"model={MODEL}", f"prompts={LIST}", "prompts.label=group", "num_images_per_prompt=2",
        "num_scored_steps=3", "num_inference_steps=5", "out=OUT", "device=cpu",
        "scores=[magnitude,anisotropy,attention_entropy,bright_ending,sharpness,tiled_l2]",
    ]],
    "explain": [[
        "explain", f"model={MODEL}", "prompt=fox on a red field 0", "suggest=true", "num_images_per_prompt=2",
        "steps=[0,1]", "num_inference_steps=5", "out=OUT", "device=cpu",
    ], [
        "explain", f"model={MODEL}", f"prompts={LIST}", "prompts.label=group", "check=true", "num_images_per_prompt=1",
        "steps=[0]", "num_inference_steps=5", "out=OUT/check", "device=cpu", "charts=1",
    ]],
    "mitigate": [[
        "mitigate", f"model={MODEL}", f"prompts={LIST}", "prompts.label=group", "target=q0.5", "method=all",
        "method.embedding.iterations=2", "method.initial_noise.iterations=2", "data=shards", "judge=pipeline",
        "num_images_per_prompt=2", "num_inference_steps=3", "out=OUT", "device=cpu",
    ]],
    "evaluate": [[
        "evaluate", f"models=[{MODEL},pipeline]", "data=shards", f"samples={LIST}", "num_images_per_prompt=2",
        "num_inference_steps=2", "timesteps_per_sample=3", "fid_samples=32", "out=OUT", "device=cpu",
    ]],
    "shards": [
        ["shards", "index", "natural", "--workers", "1"],
        ["shards", "duplicates", "natural", "--out", "OUT/groups.parquet", "--workers", "1"],
        ["ledger", "suspects", "runs/rule_evidence", "--false-positive-rate", "0.3", "--out", "OUT/suspects.parquet"],
    ],
    "demo": [["demo", "OUT/corpus", "pictures=noto", "num_samples=60", "repeated=2", "copies=5", "shard_size=30"]],
}  # fmt: skip


def command_of(name: str) -> tuple[Path, list[list[str]]]:
    """The folder that a run or an audit writes, and how `memtrain` is called for that."""
    if name in AUDITS:
        folder = Path("latents" if name == "cache" else f"audits/{name}")
        folder.mkdir(parents=True)
        return folder, [[word.replace("OUT", str(folder)) for word in words] for words in AUDITS[name]]
    words = ["train", *BRIEFLY, *RUNS[name]]
    if name != "resumed":
        return Path("runs", name), [[*words, f"run_id={name}"]]
    folder = Path("resumed")
    shutil.copytree("runs/rule_evidence", folder)
    return folder, [[*words, "resume=resumed"]]


def forked(commands: list[list[str]], ranks: int, said: Path) -> int:
    """Run `memtrain` in processes that have all imports already; how many failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            _be_rank(rank, ranks, port, said, commands)
        children.append(child)
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


def _be_rank(rank: int, ranks: int, port: int, said: Path, commands: list[list[str]]) -> None:
    from lightning_utilities.core.rank_zero import rank_zero_only

    from memtrain.cli.main import main

    code = 1
    try:
        log = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        if ranks > 1:  # as torchrun says it
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1",
                "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "bitwise",
            }  # fmt: skip
        rank_zero_only.rank = rank
        for words in commands:
            main(words)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


# ---- the two commands


def record(out: Path, only: str) -> int:
    prepare(out / "work")
    failed = 0
    for name in ("cache", *RUNS, *(audit for audit in AUDITS if audit != "cache")):
        if not re.search(only, name):
            continue
        began = time.perf_counter()
        folder, commands = command_of(name)
        failures = forked(commands, 2 if name == "two_ranks" else 1, said=out / f"{name}.log")
        failed += failures
        arrays = {} if failures else kept(folder)
        if arrays:
            save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, out / f"{name}.safetensors")
        said = f"FAILED, see {out}/{name}.log" if failures else f"{len(arrays)} tensors{_excluded(arrays)}"
        print(f"{name:28} {time.perf_counter() - began:5.1f} s  {said}", flush=True)
    if not failed:
        shutil.rmtree(out / "work")
    return min(failed, 1)


def prepare(work: Path) -> None:
    """Imports for all children, and what is trained on, in a folder that becomes the working directory."""
    import memtrain.cli.main

    print(f"memtrain: {memtrain.__file__}")
    if not Path(memtrain.__file__).resolve().is_relative_to(Path.cwd().resolve()):
        raise SystemExit("error: that is not the memtrain of this folder; run this at the top of a checkout")
    audits = ("audit.evaluate.several_models", "audit.mitigate.mitigation")
    for name in ("callbacks.canaries", "callbacks.copies", *audits, "cli.train"):
        with contextlib.suppress(ModuleNotFoundError):  # it has another name by now: then each child imports it
            importlib.import_module(f"memtrain.{name}")
    work.mkdir(parents=True)
    os.chdir(work)
    os.environ["MEMTRAIN_CACHE"] = str(work / "cache")
    torch.set_num_threads(1)
    write_pipeline(Path("pipeline"), "epsilon")
    write_pipeline(Path("v_pipeline"), "v_prediction")
    write_xl_pipeline(Path("xl_pipeline"))
    write_shards(Path("shards"), [(80, 72)])
    write_shards(Path("wide"), [(80, 72), (120, 70), (64, 112)])
    write_shards(Path("natural"), [(80, 72)], repeated=5)


def _excluded(arrays: dict[str, np.ndarray]) -> str:
    """A rule that excluded nothing would compare little."""
    trained_on = arrays.get("ledger/kept")
    return "" if trained_on is None else f", {(~trained_on).sum()} of {len(trained_on)} rows excluded"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("out", type=Path)
    recording.add_argument("--only", default="", help="a pattern of names; audits need rule_evidence")
    comparing = commands.add_parser("compare")
    comparing.add_argument("a", type=Path)
    comparing.add_argument("b", type=Path)
    said = parser.parse_args()
    return record(said.out.resolve(), said.only) if said.command == "record" else compare(said.a, said.b)


if __name__ == "__main__":
    sys.exit(main())
