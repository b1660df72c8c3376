"""`memtrain bench`"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from memtrain.cli import bench_all, bench_peers
from memtrain.cli.arguments import Parser
from memtrain.cli.distributors import add_distributor, cores, taken_from
from memtrain.data.paths import check_empty


def bench(argv: list[str]) -> None:
    parser = Parser("memtrain bench", description="Measure how fast memtrain is here; compare baselines.")
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    data = commands.add_parser("data", help="decode pictures: images a second and core, against Pillow")
    data.add_argument("--images", type=int, default=16, metavar="N", help="different pictures (default 16)")
    data.add_argument("--rounds", type=int, default=10, metavar="N", help="of all pictures (default 10)")
    data.add_argument("--json", action="store_true", help="print the figures as JSON")
    data.set_defaults(run=_data)
    startup = commands.add_parser(
        "startup", help="time and memory to the first batch of a corpus as large as LAION-400M"
    )
    startup.add_argument("--shards", type=int, default=41_400, metavar="N", help="(default 41,400)")
    startup.add_argument("--samples", type=int, default=10_000, metavar="N", help="of each shard (default 10,000)")
    startup.add_argument("--json", action="store_true", help="print the figures as JSON")
    startup.set_defaults(run=_startup)
    score = commands.add_parser("score", help="a training step without scores and with them")
    score.add_argument("--models", nargs="+", default=["demo", "sd"], metavar="NAME", help="demo, sd (both)")
    score.add_argument("--rounds", type=int, default=4, metavar="N", help="of four steps of each (default 4)")
    score.add_argument("--batch-size", type=int, metavar="N", help="(default 32 and 8 for demo, 4 and 8 for sd)")
    score.add_argument("--json", action="store_true", help="print the figures as JSON")
    score.set_defaults(run=_score)
    detection = commands.add_parser("detect", help="prompts a second, against loops over the stock pipeline")
    detection.add_argument("--prompts", type=int, default=128, metavar="N", help="(default 128)")
    detection.add_argument("--rounds", type=int, default=3, metavar="N", help="(default 3)")
    detection.add_argument("--json", action="store_true", help="print the figures as JSON")
    detection.set_defaults(run=_detect)
    memory = commands.add_parser("memory", help="what a run holds on a GPU, from configs alone, without weights")
    memory.add_argument(
        "words", nargs="*", metavar="KEY=VALUE", help="as of memtrain train: model=… adapter=… data.batch_size=…"
    )
    memory.add_argument("--json", action="store_true", help="print the figures as JSON")
    memory.set_defaults(run=_memory)
    kept = commands.add_parser("kept", help="what a run keeps of every sample, by option: on a rank, and on a machine")
    kept.add_argument("--shards", type=int, default=41_400, metavar="N", help="(default 41,400)")
    kept.add_argument("--samples", type=int, default=10_000, metavar="N", help="of each shard (default 10,000)")
    kept.add_argument("--ranks", type=int, default=8, metavar="N", help="of the machine (default 8)")
    kept.add_argument(
        "--share", type=float, default=0.1, metavar="X", help="of the samples, excluded or duplicates (default 0.1)"
    )
    kept.add_argument(
        "--folder", type=_made, metavar="DIR", help="for shards that are links, 60 kB each (default a new one)"
    )
    kept.add_argument("--only", nargs="+", default=[], metavar="OPTION", help="shards, data.where, … (default all)")
    kept.add_argument("--json", action="store_true", help="print the figures as JSON")
    kept.set_defaults(run=_kept)
    scale = commands.add_parser(
        "scale", help="time and memory of shards check and duplicates over made-up rows, and how they grow"
    )
    scale.add_argument(
        "--rows", nargs="+", type=_count, default=[10**6, 10**7, 10**8], metavar="N", help="(default 1e6 1e7 1e8)"
    )
    scale.add_argument("--memory", default="2GB", help="that each may take (%(default)s)")
    scale.add_argument(
        "--search-parts", type=int, metavar="N",
        help="do so many parts of the search for near duplicates, and scale their time (default: all)",
    )  # fmt: skip
    scale.add_argument("--folder", type=_made, help="where to write: about 250 bytes a row (default: the system's)")
    scale.add_argument("--json", action="store_true", help="print the figures as JSON")
    scale.set_defaults(run=_scale)
    recall = commands.add_parser(
        "duplicates", help="plant near duplicates among pictures: how many shards duplicates finds, and what else"
    )
    recall.add_argument("paths", nargs="*", metavar="PATH", help="shards to take pictures from (default: made up)")
    recall.add_argument("--pictures", type=int, default=1000, metavar="N", help="(default 1000)")
    recall.add_argument("--distance", type=int, default=31, help="of 256 bits (%(default)s)")
    recall.add_argument("--out", type=Path, help="a new folder, for the shards with what is planted (default: none)")
    add_distributor(recall, cores())
    recall.add_argument("--json", action="store_true", help="print the figures as JSON")
    recall.set_defaults(run=_recall)
    real_size = commands.add_parser(
        "real_size", help="Stable Diffusion 1.4's size with random weights: steps, checkpoint, resume, export, detect"
    )
    real_size.add_argument(
        "--model", default="CompVis/stable-diffusion-v1-4", metavar="NAME",
        help="whose architecture: a hub id that `memtrain bench memory` knows, or a folder (default %(default)s)",
    )  # fmt: skip
    real_size.add_argument("--resolution", type=int, default=256, metavar="PX", help="(default 256)")
    real_size.add_argument(
        "--folder", type=Path, default=Path("bench/real_size"), metavar="PATH",
        help="is made, and removed at the end; on a disk with 38 GB free (default bench/real_size)",
    )  # fmt: skip
    real_size.add_argument("--json", action="store_true", help="print the figures as JSON")
    real_size.set_defaults(run=_real_size)
    peers = commands.add_parser("peers", help="training, loading and detection against what its users use now")
    bench_peers.add_arguments(peers)
    peers.set_defaults(run=bench_peers.peers)
    everything = commands.add_parser("all", help="the ratios of all of these, beside the last ones that were committed")
    bench_all.add_arguments(everything)
    everything.set_defaults(run=bench_all.bench_all)
    commands.add_parser("mitigation", help="baselines against one another: `memtrain bench mitigation --help`")
    args = parser.parse_args(argv)
    args.run(args)


def _data(args: argparse.Namespace) -> None:
    from memtrain.data.bench import HEIGHT, SIDE, WIDTH, measure_decoding

    speed = measure_decoding(args.images, args.rounds)
    if args.json:
        print(json.dumps(asdict(speed), indent=2))
        return
    print(
        f"{WIDTH}x{HEIGHT} JPEG (quality 95, {speed.mean_bytes / 1e3:.0f} kB) to {SIDE}x{SIDE}: "
        f"{speed.images} pictures, {speed.rounds} rounds\n"
        "CPU time on one thread, a round of each in turn, medians\n\n"
        f"{'':<17}{'images/s and core':>18}{'memtrain is':>14}"
    )
    for name, rate in speed.images_per_second.items():
        ratio = f"{speed.speedup[name]:.1f}x as fast" if name in speed.speedup else ""
        print(f"{name:<17}{rate:>18.0f}{ratio:>14}")


def _startup(args: argparse.Namespace) -> None:
    from memtrain.data.bench import measure_start_up

    with tempfile.TemporaryDirectory(prefix="memtrain-bench-") as folder:
        found = measure_start_up(args.shards, args.samples, Path(folder))
    if args.json:
        print(json.dumps(asdict(found), indent=2))
        return
    print(
        f"{found.shards:,} shards with index files, {found.samples:,} samples\n"
        f"corpus open after {found.corpus_seconds:.1f} s, first batch after {found.first_batch_seconds:.1f} s\n"
        f"{found.resident_bytes / 2**20:.0f} MiB resident beyond interpreter and libraries"
    )


def _made(folder: str) -> Path:
    """A folder, which is made where it is not there yet."""
    path = Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def _kept(args: argparse.Namespace) -> None:
    from memtrain.training.bench_kept import measure_kept

    with tempfile.TemporaryDirectory(prefix="memtrain-bench-", dir=args.folder) as folder:
        found = measure_kept(
            args.shards, args.samples, args.ranks, args.share, Path(folder), args.only,
            said=lambda what: print(what, file=sys.stderr, flush=True),
        )  # fmt: skip
    if args.json:
        print(json.dumps(asdict(found), indent=2))
        return
    print(
        f"{found.samples:,} samples, {found.ranks} ranks, {found.share:.0%} of the samples listed; MiB beyond "
        "interpreter and libraries, and what a rank has alone in bytes a sample\n\n"
        f"{'':<28}{'a rank alone':>14}{'bytes':>9}{'all ranks':>12}{'first, peak':>14}"
    )
    for row in found.rows:
        alone, together, peak = (f"{size / 2**20:,.0f}" for size in (row.own, row.together, row.first_peak))
        print(f"{row.option:<28}{alone:>14}{row.own / found.samples:>9.3f}{together:>12}{peak:>14}")


def _score(args: argparse.Namespace) -> None:
    from memtrain.training.bench import BASELINE, measure_scoring

    sizes = (None, 8) if args.batch_size is None else (args.batch_size,)  # None: the model's usual one
    found = [measure_scoring(model, args.rounds, size) for model in args.models for size in sizes]
    if args.json:
        print(json.dumps([asdict(cost) for cost in found], indent=2))
        return
    for cost in found:
        print(
            f"{cost.model}: {cost.parameters / 1e6:.1f} M trained weights, "
            f"latents {'x'.join(map(str, cost.latents))}, batch {cost.batch_size}, {cost.clock}\n"
            f"{cost.rounds} rounds of {cost.steps} steps of each in turn, medians\n\n"
            f"{'':<17}{'s/step':>10}{'against ' + BASELINE:>16}"
        )
        for name, seconds in cost.step_seconds.items():
            print(f"{name:<17}{seconds:>10.3f}{cost.ratio[name]:>15.3f}x")
        print()


def _detect(args: argparse.Namespace) -> None:
    from memtrain.audit.denoiser import Denoiser
    from memtrain.audit.detect.bench import measure_detection
    from memtrain.demo import PIPELINE
    from memtrain.demo.make_base import all_captions

    speed = measure_detection(Denoiser.load(str(PIPELINE)), all_captions()[: args.prompts], args.rounds)
    if args.json:
        print(json.dumps(asdict(speed) | speed.ratios, indent=2))
        return
    print(
        f"{speed.prompts} prompts, n = {speed.num_images_per_prompt}, {speed.num_scored_steps} step, "
        f"medians of {speed.rounds} rounds, against {speed}"
    )


def _memory(args: argparse.Namespace) -> None:
    from memtrain.cli.main import composed

    cfg = composed("train", args.words)
    from hydra.utils import instantiate

    from memtrain.models.folders import trained
    from memtrain.training.architectures import architecture
    from memtrain.training.memory import CARDS, RESERVED, measure
    from memtrain.training.module import FROZEN_DTYPES

    adapter, optimizer = instantiate(cfg.adapter), instantiate(cfg.optimizer)
    adapter.check_quantization(cfg.model.get("quantization"))
    if cfg.trainer.precision not in FROZEN_DTYPES:
        raise ValueError(f"trainer.precision must be one of {', '.join(FROZEN_DTYPES)}, got {cfg.trainer.precision}")
    shards = 1
    if cfg.trainer.strategy == "fsdp":
        shards = cfg.trainer.devices
        if not isinstance(shards, int) or shards < 1:
            raise ValueError(f"trainer=fsdp: say among how many GPUs, trainer.devices=8, got {shards}")
    model = architecture(cfg.model.pretrained, trained(cfg.model.family)).model()
    if cfg.model.get("max_sequence_length") is not None:
        model.cut_captions(cfg.model.max_sequence_length)
    checkpointing = cfg.model.gradient_checkpointing
    model.make_trainable(cfg.model.train_text_encoder, checkpointing, channels_last=False, compile=False)
    found = measure(
        model,
        adapter,
        optimizer,
        resolution=cfg.data.resolution,
        batch_size=cfg.data.batch_size,
        ema=cfg.ema.decay > 0,
        dtype=FROZEN_DTYPES[cfg.trainer.precision],
        gradient_checkpointing=checkpointing,
        quantization=cfg.model.get("quantization"),
        anchored="anchored" in cfg.score.kinds,
        shards=shards,
    )
    rows = {f"weights, {name}": size for name, size in found.weights.items()}
    rows |= {"gradients": found.gradients, "optimizer": found.optimizer, "average (ema)": found.average}
    rows |= {"activations": found.activations, "all": found.total}
    fits = {card: found.fits(card) for card in CARDS}
    if args.json:
        print(json.dumps({"trained": found.trained, "bytes": rows, "fits_gib": fits}, indent=2))
        return
    print(
        f"{cfg.model.pretrained}: {found.trained / 1e6:,.1f} M trained weights, {cfg.data.batch_size} pictures of "
        f"{cfg.data.resolution} px, {cfg.trainer.precision}"
        f"{', gradient checkpointing' if checkpointing else ''}{f', a GPU of {shards}' if shards > 1 else ''}\n"
    )
    for name, size in rows.items():
        print(f"{name:<26}{size / 2**30:>8.2f} GiB")
    cards = ", ".join(f"{card} GB card: {'fits' if fit else 'does not fit'}" for card, fit in fits.items())
    print(
        f"\n{cards}; {RESERVED / 2**30:.0f} GiB of each left free. Not counted: what the forward without a gradient, "
        "the backward, the VAE and drawing need for a moment, and DDP's second copy of the gradients."
    )


def _count(text: str) -> int:
    """A number of rows, 1000000 or 1e6."""
    return int(float(text))


def _scale(args: argparse.Namespace) -> None:
    from memtrain.cli.shard_audits import BASE, memory_of, sort_fast

    memory = memory_of(args.memory)
    sort_fast()
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from memtrain.data.scale import extrapolated, measure_scale, slope

    found = []
    for rows in args.rows:
        with (
            tempfile.TemporaryDirectory(prefix="memtrain-bench-", dir=args.folder) as folder,
            ProcessPoolExecutor(1, get_context("spawn")) as pool,  # one each, so that none holds what another took
        ):
            wanted = pool.submit(measure_scale, rows, Path(folder), memory, BASE, args.search_parts)
            found.append(wanted.result())
        if not args.json:
            _print_scale(found[-1], is_first=len(found) == 1)
    larger = {rows: extrapolated(found, rows) for rows in (400_000_000, 5_000_000_000)}
    if args.json:
        print(json.dumps({"measured": [asdict(scale) for scale in found], "extrapolated": larger}, indent=2))
        return
    if len(found) > 1:
        said = ", ".join(f"{step} {slope(found, step):.2f}" for step in found[0].cpu_seconds)
        print(f"\ntime grows with rows to the power of: {said}")
    print("\nextrapolated, hours of one core (docs/guides/large_corpora.md has the formula):")
    for rows, hours in larger.items():
        print(f"{rows:>15,} rows: " + ", ".join(f"{name} {seconds / 3600:.1f}" for name, seconds in hours.items()))


def _print_scale(scale, is_first: bool) -> None:
    if is_first:
        print(
            f"memory={scale.memory / 1e9:.1f}GB, one process and one thread. Seconds of processor (of the clock)\n\n"
            f"{'rows':>13}{'check':>16}{'equal':>16}{'near':>18}{'groups':>16}{'rows/s':>9}{'peak':>9}{'disk':>9}"
            f"{'found':>20}"
        )
    times = [f"{scale.cpu_seconds[name]:.0f} ({scale.seconds[name]:.0f})" for name in scale.cpu_seconds]
    duplicates = sum(seconds for name, seconds in scale.cpu_seconds.items() if name != "check")
    groups = f"{scale.found} of {scale.planted}"
    if scale.found is None:
        groups = f"{scale.searched} of {scale.searches} parts"
    print(
        f"{scale.rows:>13,}{times[0]:>16}{times[1]:>16}{times[2]:>18}{times[3]:>16}{scale.rows / duplicates:>9.0f}"
        f"{max(scale.peak_bytes.values()) / 1e9:>6.2f} GB{scale.disk_bytes / 1e9:>6.1f} GB{groups:>20}"
    )


def _recall(args: argparse.Namespace) -> None:
    distributor = taken_from(vars(args))
    if args.out is not None:
        check_empty(args.out)
        args.out.mkdir(parents=True, exist_ok=True)
    from memtrain.data.duplicates import check_distance
    from memtrain.data.recall import EVERY, measure_recall
    from memtrain.data.sources import local_shards

    check_distance(args.distance)
    source = local_shards(args.paths) if args.paths else []
    with contextlib.ExitStack() as stack:
        folder = args.out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="memtrain-bench-")))
        found = measure_recall(folder, args.pictures, source, args.distance, distributor, 10**9)
    if args.json:
        print(json.dumps(asdict(found) | {"precision": found.precision}, indent=2))
        return
    print(
        f"{found.pictures} pictures, one near duplicate for {EVERY} of them; within {found.distance} of 256 bits\n\n"
        f"{'':<24}{'planted':>8}{'found':>8}{'recall':>9}"
    )
    for kind in found.planted:
        print(f"{kind:<24}{found.planted[kind]:>8}{found.found[kind]:>8}{found.recall(kind):>9.1%}")
    print(
        f"\n{found.true} of {found.pairs} pairs in groups are of one picture: precision {found.precision:.1%}"
        + ("; what the shards repeat themselves counts as false" if args.paths else "")
    )


def _real_size(args: argparse.Namespace) -> None:
    from memtrain.cli.bench_real_size import as_json, measure_real_size, shown

    found = measure_real_size(
        args.model, args.resolution, args.folder, said=lambda what: print(what, file=sys.stderr, flush=True)
    )
    print(as_json(found) if args.json else shown(found))
