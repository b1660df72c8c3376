"""Tiny real things: a corpus of tars, a Stable Diffusion of a few thousand weights, a training run over both.

What is slow to import is imported in functions: the process that deals out the tests reads this file, too.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections import Counter
from multiprocessing import spawn
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

    from memtrain.training.module import DiffusionTraining

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a few words are no work for threads
os.environ["MEMTRAIN_CACHE"] = tempfile.mkdtemp(prefix="memtrain-tests-")

FORKS = pytest.StashKey["Forks"]()


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # until all is imported, whose objects stay
    if config.getoption("numprocesses", None):  # the tests run in other processes
        return
    from hypothesis import HealthCheck, settings

    # the same examples every time, however slow the machine is
    settings.register_profile(
        "tests", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("tests")


def pytest_collection_finish() -> None:
    gc.freeze()  # no test need look through the libraries' objects for garbage
    gc.set_threshold(10_000)  # nor so often: it took a fifteenth of all time
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """A copy of this process, with all imports and before any test has left something in it, will make forks."""
    if any("forks" in item.fixturenames for item in session.items):
        from tests.support.forks import Forks

        session.config.stash[FORKS] = Forks()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests come first, so that no process is left alone with one in the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    from memtrain.demo.corpus import recipe_of
    from memtrain.demo.shards import write_corpus

    folder = tmp_path_factory.mktemp("corpus") / "shards"
    write_corpus(folder, recipe_of(48, seed=3, shard_size=16, pictures="noto"), progress=False)
    return folder


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory) -> dict[str, Path]:
    """Untrained pipelines by prediction type."""
    import torch
    from diffusers import AutoencoderKL

    from memtrain.demo.make_base import untrained_pipeline

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    pipeline, folders = untrained_pipeline(vae, (16,), seed=0), {}
    with torch.no_grad():  # text is heard in the middle alone: louder, so that scores lie around 1
        pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_out[0].weight.mul_(6)
    for prediction_type in ("epsilon", "v_prediction"):
        pipeline.scheduler.register_to_config(prediction_type=prediction_type)
        folders[prediction_type] = tmp_path_factory.mktemp("pipelines") / prediction_type
        pipeline.save_pretrained(folders[prediction_type])
    return folders


@pytest.fixture(scope="session")
def pipeline_folder(pipelines) -> Path:
    return pipelines["epsilon"]


@pytest.fixture(scope="session")
def deep_folder(pipelines, tmp_path_factory) -> Path:
    """One whose UNet goes down once, and hears the text there as well."""
    import torch

    from memtrain.demo.make_base import untrained_unet
    from tests.support import families

    pipeline, folder = families.stable_diffusion(pipelines["epsilon"]), tmp_path_factory.mktemp("deep") / "pipeline"
    torch.manual_seed(0)
    pipeline.register_modules(unet=untrained_unet((16, 16), pipeline.unet.config.sample_size, latent_channels=4))
    pipeline.save_pretrained(folder)
    return folder


def folder_of(family: str, pipeline_folder: Path, tmp_path_factory) -> Path:
    """An untrained pipeline of this function of `tests.support.families`, saved."""
    from tests.support import families

    folder = tmp_path_factory.mktemp(family) / "pipeline"
    getattr(families, family)(families.stable_diffusion(pipeline_folder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def xl_folder(pipeline_folder, tmp_path_factory) -> Path:
    return folder_of("stable_diffusion_xl", pipeline_folder, tmp_path_factory)


@pytest.fixture(scope="session")
def flow_folder(pipeline_folder, tmp_path_factory) -> Path:
    """An untrained Stable Diffusion 3."""
    return folder_of("stable_diffusion_3", pipeline_folder, tmp_path_factory)


@pytest.fixture(scope="session")
def flux_folder(pipeline_folder, tmp_path_factory) -> Path:
    """An untrained Flux.1 dev."""
    return folder_of("flux", pipeline_folder, tmp_path_factory)


@pytest.fixture(scope="session")
def klein_folder(pipeline_folder, tmp_path_factory) -> Path:
    """An untrained Flux.2 Klein."""
    return folder_of("flux2_klein", pipeline_folder, tmp_path_factory)


def build_module(
    pipeline: Path, exclusion=None, model: dict | None = None, method=None, optimizer=None, **options
) -> DiffusionTraining:
    from memtrain.core.exclusion import KeepAll
    from memtrain.models.pretrained import from_pretrained
    from memtrain.training.methods import Method
    from memtrain.training.module import DiffusionTraining
    from memtrain.training.objective import Objective
    from memtrain.training.optimizers import AdamW
    from memtrain.training.score_memory import Scoring

    model_options = dict(train_text_encoder=False, gradient_checkpointing=False, channels_last=False, compile=False)
    objective = dict(denominator="kept", caption_dropout=0.1, min_snr_gamma=None, noise_offset=0.0)
    objective |= {name: options.pop(name) for name in objective.keys() & options}
    defaults = dict(
        seed=7,
        resolution=64,
        scoring=Scoring(),
        reference_every=2,
        reference_batch=4,
        ema_decay=0.9,
    )
    return DiffusionTraining(
        from_pretrained(str(pipeline), "auto", **(model_options | (model or {}))),
        exclusion or KeepAll(),
        # a large eps: with 1e-8 Adam turns gradients that are rounding noise into steps of the full rate
        optimizer or AdamW(1e-3, (0.9, 0.999), 0.01, 1e-3, "constant", 0, eight_bit=False),
        method or Method(),
        objective=Objective(**objective),
        **(defaults | options),
    )


def build_data(corpus: Path, batch_size: int = 4, num_workers: int = 0, **options):
    from memtrain.data.datamodule import from_shards

    groups = dict(seed=7, canaries=3, repeats=4, reference=8) | options
    return from_shards(str(corpus), 64, batch_size, num_workers, **groups)


def fit(
    module,
    data,
    run_dir: Path,
    max_steps: int,
    accumulate: int = 1,
    callbacks=(),
    ckpt_path=None,
    ranks=1,
    strategy=None,
    **options,
):
    """`ranks` is how many processes do this, each started with the environment of torchrun."""
    import pytorch_lightning as pl
    from pytorch_lightning.strategies import DDPStrategy

    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy or (DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto"),
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=run_dir,
        gradient_clip_val=1.0,
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def weights(module) -> torch.Tensor:
    import torch

    return torch.cat([parameter.detach().flatten() for parameter in module.trained_parameters()])


@pytest.fixture(scope="session")
def forks(request):
    """Processes that have all imports already; of all tests that need some."""
    with request.config.stash[FORKS] as server:
        yield server


@pytest.fixture
def spawned_by_forks(forks):
    """What multiprocessing spawns in this process, too, has all imports already."""
    before = spawn.get_executable()
    spawn.set_executable(str(forks.python))
    yield
    spawn.set_executable(before)


@pytest.fixture(scope="module", autouse=True)
def no_open_wandb_run():
    """What the tests of another file left open in this process is not the run of these."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
