"""`memtrain bench peers`: the same work by memtrain and by what its users use now, in one run."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from memtrain.data.paths import check_file
from memtrain.demo import PIPELINE
from memtrain.models.folders import Kind, check_pipeline

PYTHON = sys.executable
CLOCK = Path(__file__).parents[1] / "training" / "step_clock.py"  # for an interpreter that lacks memtrain
PLAIN, SCORED, CACHED = "memtrain, without scores", "memtrain, with scores", "memtrain, with scores, from a cache"
AMORTISED = "memtrain, each 4th visit scored, from a cache"
DIFFUSERS, PAPER = "diffusers' train_text_to_image.py", "the paper's script, --hard_threshold"
MODULES = ("datasets", "torchvision")  # that their scripts import, and memtrain does not
_SEED = 0
_HYPERPARAMETERS = dict(learning_rate="1e-5", lr_scheduler="constant", lr_warmup_steps="0", max_grad_norm="1")


@dataclass(frozen=True)
class Work:
    """What each program is given to do."""

    model: Path
    resolution: int
    batch_size: int
    warmup: int
    steps: int  # measured, in a round
    threads: int
    precision: str  # no or bf16, as accelerate says it
    settings: Sequence[str] = ()  # of memtrain's runs, beyond what is the same for all


@dataclass(frozen=True)
class Scripts:
    """Programs of others: their scripts, None where it is left out, and what runs them."""

    diffusers: Path | None
    paper: Path | None
    python: str  # the interpreter
    modules: Path | None  # a folder with modules for them alone


@dataclass(frozen=True)
class Step:
    """What a training step of a program took: seconds, one of each round; ratios to another one of the same round."""

    seconds: list[float]
    images_per_second: float
    against: dict[str, list[float]]
    share_of_peak: float  # of the floating point operations a second that a large matrix product reaches here
    waiting: float | None  # share of the time in which the GPU does nothing; None: there is none


def measure_steps(
    work: Work, folder: Path, rounds: int, scripts: Scripts, said: Callable[[str], object]
) -> dict[str, Step]:
    """Train by each program in turn, round by round, each time in a process of its own.

    Args:
        folder: an empty one.
        scripts: that memtrain is compared with.
        said: is told what goes on.

    Raises:
        ValueError: one of them failed; with its last words.
    """
    commands = _commands(work, folder, scripts)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, command in commands.items():
            said(f"round {number + 1} of {rounds}: {name}")
            wanted = {"out": str(folder / "figures.json"), "warmup": work.warmup, "steps": work.steps}
            modules = scripts.modules if name in (DIFFUSERS, PAPER) else None
            _run(command(json.dumps(wanted | {"count": number == 0})), folder, work, modules)
            found[name].append(json.loads((folder / "figures.json").read_text()))
    return steps_of(found, work)


def steps_of(found: dict[str, list[dict[str, float]]], work: Work) -> dict[str, Step]:
    """What the clocks of all rounds say, by program: CPU time where there is one thread and no GPU, else time."""
    clock = "wall" if work.threads > 1 or "gpu_bytes" in next(iter(found.values()))[0] else "cpu"
    seconds = {name: [one[clock] for one in rounds] for name, rounds in found.items()}
    against = {PLAIN: (DIFFUSERS,)} | dict.fromkeys((SCORED, CACHED, AMORTISED), (DIFFUSERS, PAPER))
    return {
        name: Step(
            seconds[name],
            work.batch_size / median(seconds[name]),
            {
                other: [ours / theirs for ours, theirs in zip(seconds[name], seconds[other], strict=True)]
                for other in against.get(name, ())
                if other in seconds
            },
            rounds[0]["flops"] / median(seconds[name]) / rounds[0]["peak_flops"],
            rounds[0].get("waiting"),
        )
        for name, rounds in found.items()
    }


Command = Callable[[str], list[str]]  # what the clock is to do, as JSON -> a command


def _commands(work: Work, folder: Path, scripts: Scripts) -> dict[str, Command]:
    """Each program's command, by its name; what it trains on lies in `folder`."""
    from memtrain.data.bench import HEIGHT, SIDE, WIDTH, write_photos

    height, width = (work.resolution * side // SIDE for side in (HEIGHT, WIDTH))
    count = max(64, work.batch_size * 4)
    write_photos(folder / "shards", 2, count // 2, height, width)
    _unpack(folder)
    ours = _train_words(work, folder)
    scored = ["exclusion=fixed", "exclusion.threshold=1e9"]
    cached = [f"data.cache={folder / 'latents'}"]
    program = [PYTHON, "-m", "memtrain.cli.main"]
    shared = [word for word in ours if word.startswith(("model", "data.shards", "data.resolution", "data.cache_dir"))]
    _run([*program, "cache", *shared, f"out={folder / 'latents'}", "dtype=float32"], folder, work)
    commands = {PLAIN: ["exclusion=none", "score.every=0"], SCORED: scored, CACHED: [*scored, *cached]}
    commands[AMORTISED] = [*commands[CACHED], "score.every_visits=4"]
    made: dict[str, Command] = {
        name: lambda wanted, words=words: [
            PYTHON, "-m", "memtrain.training.step_clock", wanted, "-m", "memtrain.cli.main", "train", *ours, *words,
        ]
        for name, words in commands.items()
    }  # fmt: skip
    theirs = {
        "pretrained_model_name_or_path": str(work.model), "resolution": str(work.resolution),
        "train_batch_size": str(work.batch_size), "max_train_steps": str(work.warmup + work.steps + 1),
        "mixed_precision": work.precision, "checkpointing_steps": str(10**9), "output_dir": str(folder / "theirs"),
        "dataloader_num_workers": "0", "seed": str(_SEED), **_HYPERPARAMETERS,
    }  # fmt: skip
    clock = ["-m", "memtrain.training.step_clock"] if scripts.python == PYTHON else [str(CLOCK)]
    own = {
        DIFFUSERS: (scripts.diffusers, {"train_data_dir": str(folder / "pictures")}),
        PAPER: (scripts.paper, {"dataset": str(folder / "paired"), "hard_threshold": "1e9"}),
    }
    for name, (script, more) in own.items():
        if script is not None:
            words = [f"--{key}={value}" for key, value in (theirs | more).items()]
            made[name] = lambda wanted, script=script, words=words: [
                scripts.python, *clock, wanted, str(script), *words, "--use_ema", "--center_crop",
            ]  # fmt: skip
    return made


def _train_words(work: Work, folder: Path) -> list[str]:
    looks = ("canaries", "validation", "copies", "sample_grid", "memorized_table", "report", "summary", "export")
    return [
        "model=auto", f"model.pretrained={work.model}", f"data.shards={folder / 'shards'}",
        f"data.resolution={work.resolution}", f"data.batch_size={work.batch_size}", "data.num_workers=0",
        "data.duplicates=none", f"data.cache_dir={folder / 'cache'}", "logger=csv", f"runs_dir={folder / 'runs'}",
        f"trainer.precision={'32-true' if work.precision == 'no' else 'bf16-mixed'}",
        f"trainer.max_steps={work.warmup + work.steps + 2}", f"optimizer.lr={_HYPERPARAMETERS['learning_rate']}",
        f"seed={_SEED}", *(f"callbacks.{look}=null" for look in looks), *work.settings,
    ]  # fmt: skip


def _unpack(folder: Path) -> None:
    """The samples of the shards as the scripts want them: pictures with metadata.jsonl, and pairs of jpg and txt."""
    for name in ("pictures", "paired"):
        (folder / name).mkdir()
    captions = []
    for shard in sorted((folder / "shards").glob("*.tar")):
        for member, data in _members(shard):
            if member.suffix == ".jpg":
                (folder / "pictures" / member.name).write_bytes(data)
            elif member.suffix == ".txt":
                captions.append({"file_name": f"{member.stem}.jpg", "text": data.decode()})
            if member.suffix in (".jpg", ".txt"):
                (folder / "paired" / member.name).write_bytes(data)
    lines = "".join(json.dumps(caption) + "\n" for caption in captions)
    (folder / "pictures" / "metadata.jsonl").write_text(lines)


def _members(shard: Path) -> Iterator[tuple[Path, bytes]]:
    with tarfile.open(shard) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                yield Path(Path(member.name).name), file.read()


def _run(command: Sequence[str], folder: Path, work: Work, modules: Path | None = None) -> None:
    own = {
        "OMP_NUM_THREADS": str(work.threads), "HF_HOME": str(folder / "huggingface"), "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1", "MPLBACKEND": "agg", "WANDB_MODE": "disabled",
    }  # fmt: skip
    if modules is not None:
        own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(modules), os.environ.get("PYTHONPATH")]))
    with (folder / "log").open("wb") as log:
        code = subprocess.run(command, cwd=folder, env=os.environ | own, stdout=log, stderr=log).returncode
    if code:
        said = [line for line in (folder / "log").read_text(errors="replace").splitlines() if line.strip()]
        what = next((word for word in command[3:] if word.endswith(".py")), "memtrain")
        raise ValueError(f"{what} ended with code {code}: {(said or ['it said nothing'])[-1].strip()}")


# ---- what is given


def scripts_of(args: argparse.Namespace) -> Scripts:
    """The scripts that are given, each itself or by the folder of its repository.

    Raises:
        ValueError: one is not there, or what it imports is not installed.
    """
    modules = None if args.modules is None else args.modules.resolve()
    found = {"--diffusers": args.diffusers or _installed_script(), "--paper": args.paper}
    for option, path in found.items():
        if path is not None:
            inside = (path / "train_text_to_image.py", path / "examples" / "text_to_image" / "train_text_to_image.py")
            file = next((file for file in inside if file.is_file()), path)
            check_file(option, file, "name train_text_to_image.py, or the folder of its repository")
            found[option] = file.resolve()
            lacking = [name for name in MODULES if not _is_there(name, modules)]
            if args.python is None and lacking:
                raise ValueError(
                    f"{option} imports {' and '.join(lacking)}: pip install --target FOLDER --no-deps torchvision, and "
                    "say --modules FOLDER (beside a torch without CUDA it breaks other programs), and pip install "
                    "'.[peers]'"
                )
    return Scripts(found["--diffusers"], found["--paper"], args.python or PYTHON, modules)


def _is_there(module: str, modules: Path | None) -> bool:
    return importlib.util.find_spec(module) is not None or (modules is not None and (modules / module).is_dir())


def _installed_script() -> Path | None:
    """That of an installed diffusers that has its examples beside it, as a clone has."""
    spec = importlib.util.find_spec("diffusers")
    if spec is None or spec.origin is None:
        return None
    examples = Path(spec.origin).parents[2] / "examples" / "text_to_image" / "train_text_to_image.py"
    return examples if examples.is_file() else None


def check_model(model: Path) -> None:
    """Raises ValueError where a model is no folder of Stable Diffusion 1 or 2, which the scripts are for."""
    kind = Kind(frozenset({"StableDiffusionPipeline"}), "peers' scripts train Stable Diffusion 1 and 2; name a folder")
    check_pipeline("--model", str(model), kind)


# ---- the command

PARTS = ("training", "loading", "detection")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `memtrain bench peers` takes."""
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=" ".join(PARTS))
    parser.add_argument(
        "--diffusers", type=Path, metavar="PATH",
        help="a clone of diffusers at the installed release, or its train_text_to_image.py; needs '.[peers]'",
    )  # fmt: skip
    parser.add_argument(
        "--paper", type=Path, metavar="PATH", help="a clone of the paper's repository, or its script; needs '.[peers]'"
    )
    parser.add_argument("--python", metavar="PATH", help="interpreter for these (this one)")
    parser.add_argument("--modules", type=Path, metavar="PATH", help="a folder of modules for these alone, as of "
                        "pip install --target")  # fmt: skip
    parser.add_argument("--model", default="demo", metavar="NAME", help="demo, sd (SD 1's UNet a fifth as wide), or a "
                        "folder of Stable Diffusion 1 or 2 (default demo)")  # fmt: skip
    parser.add_argument("--resolution", type=int, metavar="PX", help="(default 64 for demo, else 256)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="(default 8)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of every program in turn (default 3)")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="measured in a round (default 8)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of each program (default 1)")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="of training (default no: float32)")
    parser.add_argument("--settings", nargs="+", default=[], metavar="KEY=VALUE", help="of memtrain's runs alone, as "
                        "optimizer.fused=true")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def peers(args: argparse.Namespace) -> None:
    """Measure what is asked for, and print it."""
    for name in ("batch_size", "rounds", "steps", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be >= 1, got {getattr(args, name)}")
    scripts = scripts_of(args)
    if args.model not in ("demo", "sd"):
        check_model(Path(args.model))
    found: dict = {}
    with tempfile.TemporaryDirectory(prefix="memtrain-bench-") as temporary:
        folder = Path(temporary)
        if "training" in args.only:
            found["training"] = _training(args, folder, scripts)
        if "loading" in args.only:
            from memtrain.data.bench import measure_loading

            (folder / "loading").mkdir()
            found["loading"] = measure_loading(64, args.rounds, folder / "loading")
        if "detection" in args.only:
            found["detection"] = _detection(args)
    if args.json:
        print(json.dumps(found, default=asdict, indent=2))
        return
    lines = [*_shown_steps(found["training"], scripts)] if "training" in found else []
    if "loading" in found:
        one = found["loading"]
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in one.images_per_second.items())
        lines.append(f"loading, images a second and core, {one.side} px: {rates}: {one.speedup:.1f}x as fast "
                     f"({one.spread[0]:.1f} to {one.spread[1]:.1f})")  # fmt: skip
    if "detection" in found:
        lines.append(f"detection, a prompt at a time by {found['detection']}")
    print("\n".join(lines))


def _training(args: argparse.Namespace, folder: Path, scripts: Scripts) -> dict[str, Step]:
    model = {"demo": PIPELINE, "sd": folder / "sd"}.get(args.model, Path(args.model)).resolve()
    if args.model == "sd":
        from memtrain.training.bench import write_sd_shaped

        write_sd_shaped(model)
    resolution = args.resolution or (64 if args.model == "demo" else 256)
    work = Work(model, resolution, args.batch_size, 2, args.steps, args.threads, args.precision, args.settings)
    (folder / "training").mkdir()
    return measure_steps(
        work, folder / "training", args.rounds, scripts, said=lambda what: print(what, file=sys.stderr, flush=True)
    )


def _detection(args: argparse.Namespace):
    import torch

    from memtrain.audit.denoiser import Denoiser
    from memtrain.audit.detect.bench import measure_detection
    from memtrain.demo.make_base import all_captions

    torch.set_num_threads(args.threads)
    model = PIPELINE if args.model in ("demo", "sd") else args.model
    return measure_detection(Denoiser.load(str(model)), all_captions()[:128], args.rounds)


def _shown_steps(steps: dict[str, Step], scripts: Scripts) -> Iterator[str]:
    """The table of training steps, and what is not in it."""
    yield f"{'a training step':<46}{'s':>8}{'images/s':>10}{'of peak':>9}  against"
    for name, step in steps.items():
        against = "; ".join(
            f"{median(ratios):.2f} of {other} ({min(ratios):.2f} to {max(ratios):.2f})"
            for other, ratios in step.against.items()
        )
        idle = "" if step.waiting is None else f"; the GPU waits {step.waiting:.0%}"
        seconds = median(step.seconds)
        yield f"{name:<46}{seconds:>8.3f}{step.images_per_second:>10.1f}{step.share_of_peak:>9.1%}  {against}{idle}"
    for option, path in (("--diffusers", scripts.diffusers), ("--paper", scripts.paper)):
        if path is None:
            yield f"{option} PATH would compare with that script"
    yield ""
