"""What can be known to be wrong is said before anything heavy is imported, and help costs nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Each command in a fork of its own of a process that has imported the program, and what reads its config.
FORKS = """
import gc, io, json, os, sys
from contextlib import redirect_stderr, redirect_stdout
import hydra.main, memtrain.cli.checks, memtrain.cli.schema
from memtrain.cli.main import main

with redirect_stdout(io.StringIO()):
    main(["train", "--cfg", "job"])  # Hydra looks for its plugins once
gc.disable()  # nobody lives long enough to leave any
for argv in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        said, code = io.StringIO(), 0
        with redirect_stdout(said), redirect_stderr(said):
            try:
                main(argv)
            except SystemExit as stop:
                code = stop.code
        heavy = {"torch", "diffusers", "transformers", "pytorch_lightning", "webdataset"} & set(sys.modules)
        print(json.dumps([code, said.getvalue(), sorted(heavy)]), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, argv
"""
HELP = [["--help"], ["--version"], *([command, "--help"] for command in (
    "train", "detect", "explain", "mitigate", "repair", "evaluate", "report", "shards", "cache", "bench", "demo",
    "ledger", "sweep",
))]  # fmt: skip
AUDIT = ["detect", "explain", "mitigate"]
REFUSED = [  # the command, {tmp} an empty folder and {shards} a corpus; what is said
    (["trian"], "no command 'trian'"),
    *([[command, "nonsense=1"], "nonsense"] for command in (*AUDIT, "train", "evaluate", "cache", "demo")),
    *([[command, "batch_size=many"], "many"] for command in (*AUDIT, "evaluate")),
    (["train"], "data.shards is missing; say data.shards="),
    (["detect"], "model.pretrained is missing"),
    (["train", "trainer.max_steps=abc"], "abc"),
    (["cache", "processes=two"], "two"),
    (["demo", "{tmp}/corpus", "copies=two"], "two"),
    (["sweep", "trials=two"], "two"),
    (["sweep", "trials=0"], "trials must be >= 1"),
    (["sweep", "study=none"], "none"),
    (["report", "{run}", "--nonsense"], "nonsense"),
    (["ledger", "suspects"], "--help says more"),
    (["shards", "pack"], "--help says more"),
    (["bench", "nonsense"], "nonsense"),
    *(
        [[command, f"data.shards={shards}"], says]
        for command in ("train", "cache")
        for shards, says in (
            ("/nowhere", "data.shards=/nowhere: no such shard"),
            ("{tmp}", "the folder has no .tar in it"),
            ("'/nowhere/{{0..3}}.tar'", "/nowhere/0.tar (and 3 more)"),
        )
    ),
    *(
        [[command, "data.shards={shards}", f"model.pretrained={model}"], says]
        for command in ("train", "cache")
        for model, says in (
            ("/nowhere/x", "no such folder"),
            ("{tmp}", "has no model_index.json"),
            ("{xl}", "{xl} is a StableDiffusionXLPipeline; say model=stable_diffusion_xl"),
        )
    ),
    *(
        [[command, "data.shards={shards}", "model.pretrained={pipeline}", family], says]
        for command in ("train", "cache")
        for family, says in (
            ("model=stable_diffusion_xl", "{pipeline} is a StableDiffusionPipeline; say model=stable_diffusion"),
            ("model.family=sdxl", "model.family must be one of auto, stable_diffusion, stable_diffusion_xl"),
        )
    ),
    (
        ["train", "data.shards={shards}", "model=stable_diffusion_3", "model.pretrained={pipeline}"],
        "is a StableDiffusionPipeline; say model=stable_diffusion",
    ),
    *(
        [["train", "data.shards={shards}", "model=demo", argument], says]
        for argument, says in (
            ("ckpt_path={tmp}/no.ckpt", "ckpt_path={tmp}/no.ckpt: no such file"),
            ("data.exclude_keys={tmp}/no.txt", "data.exclude_keys={tmp}/no.txt: no such file"),
            ("data.repeats_from={tmp}/no.parquet", "data.repeats_from={tmp}/no.parquet: no such file"),
            ("canaries.file={tmp}/no.csv", "canaries.file={tmp}/no.csv: no such file"),
            ("resume={tmp}", "resume={tmp}: no run"),
        )
    ),
    (["cache", "data.shards={shards}", "processes=0"], "processes must be >= 1"),
    *([[command, "model=/nowhere/x", "prompts={prompts}"], "model=/nowhere/x: no such folder"] for command in AUDIT),
    *([[command, "model={tmp}", "prompts={prompts}"], "has no model_index.json"] for command in AUDIT),
    (["explain", "model={pipeline}", "prompt=a", "lora=/no/lora"], "lora=/no/lora: no such file or folder"),
    (["mitigate", "model={pipeline}", "prompt=a", "lora=/no/lora"], "lora=/no/lora: no such file or folder"),
    (["detect", "model={pipeline}", "prompts={prompts}", "lora={tmp}"], "has no pytorch_lora_weights.safetensors"),
    (["detect", "model={pipeline}", "prompts={prompts}", "lora={prompts}"], "is no .safetensors file"),
    (["evaluate", "model={pipeline}", "data={shards}", "lora=/no/lora"], "lora=/no/lora: no such file"),
    *([[command, "model={pipeline}", "prompts={tmp}/no.txt"], "no.txt: no such file"] for command in AUDIT),
    (["detect", "model={pipeline}", "memorized={prompts}", "other={tmp}/no.csv"], "no.csv: no such file"),
    (["detect", "model={pipeline}"], "say prompts=FILE"),
    (["detect", "model={pipeline}", "prompts={prompts}", "embedding=/no.pt"], "embedding=/no.pt: no such file"),
    (["detect", "prompts={prompts}"], "model.pretrained"),
    (["explain", "model={pipeline}"], "one of the two"),
    (["mitigate", "model={pipeline}", "prompt=a", "method=magic"], "method must be one of"),
    (["mitigate", "model={pipeline}", "prompt=a", "reference={tmp}/no.txt"], "no.txt: no such file"),
    (["mitigate", "model={pipeline}", "prompt=a", "judge={tmp}"], "judge={tmp} is not a pipeline"),
    (["mitigate", "model={pipeline}", "prompt=a", "clip=/no/clip"], "clip=/no/clip: no such folder"),
    (["mitigate", "model={pipeline}", "prompts={prompts}", "data=/nowhere"], "data.shards=/nowhere: no such shard"),
    (["repair", "forget={prompts}", "out={tmp}/new"], "model.pretrained"),
    (["repair", "model={pipeline}", "out={tmp}/new"], "forget"),
    (["repair", "model={pipeline}", "forget={tmp}/no.csv", "out={tmp}/new"], "forget={tmp}/no.csv: no such file"),
    (["repair", "model={pipeline}", "forget={prompts}", "out={tmp}/new", "method=magic"], "method must be one of"),
    (
        ["repair", "model={pipeline}", "forget={prompts}", "out={tmp}/new", "weights=half"],
        "weights must be lora or all",
    ),
    (["repair", "model={pipeline}", "forget={prompts}", "out={tmp}/new", "keep=/nowhere"], "/nowhere: no such shard"),
    (["repair", "model={pipeline}", "forget={prompts}", "out={shards}"], "holds other things"),
    (["evaluate", "data={shards}"], "no model"),
    (["evaluate", "models=[/nowhere/x]", "data={shards}"], "model=/nowhere/x: no such folder"),
    (["evaluate", "model={pipeline}"], "data is missing"),
    (["evaluate", "model={pipeline}", "data={tmp}"], "the folder has no .tar in it"),
    (["evaluate", "model={pipeline}", "data={shards}", "samples=/no.csv"], "samples=/no.csv: no such file"),
    *(
        [["evaluate", "model={pipeline}", "data={shards}", f"{key}=/no/file"], f"{key}=/no/file: no such"]
        for key in ("sscd", "fid", "clip")
    ),
    (["report", "{tmp}"], "is no run"),
    (["report", "{tmp}", "--out", "{tmp}/no/r.html"], "there is no folder"),
    (["report", "{run}", "--duplicates", "{tmp}/no.parquet"], "no.parquet: no such file"),
    (["ledger", "show", "{tmp}"], "has no ledger"),
    (["ledger", "suspects", "{tmp}", "--out", "{tmp}/list.parquet"], "has no ledger"),
    *([["shards", task, "/nowhere"], "no such shard"] for task in ("check", "index")),
    *([["shards", task, "{tmp}"], "no .tar in it"] for task in ("check", "index")),
    (["shards", "duplicates", "/nowhere", "--out", "{tmp}/d.parquet"], "no such shard"),
    (["shards", "pack", "/nowhere", "{tmp}/out"], "/nowhere is neither a folder nor"),
    (["demo", "{shards}"], "{shards} holds a demo corpus of other"),
    (["demo", "{tmp}/corpus", "num_samples=0"], "num_samples must be at least 1"),
    (["train", "-m", "data.shards={shards}", "model=demo", "run_id=mine"], "run_id=mine is for one run"),
]


def run(commands: list[list[str]], folder: Path) -> list:
    environment = {name: value for name, value in os.environ.items() if name != "MEMTRAIN_TRACEBACK"}
    done = subprocess.run(
        [sys.executable, "-c", FORKS],
        input=json.dumps(commands), capture_output=True, text=True, cwd=folder, env=environment, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def answers(tmp_path_factory, corpus, pipeline_folder, xl_folder):
    """What every command of this file was answered, and what it stood for."""
    folder = tmp_path_factory.mktemp("refusals")
    (folder / "empty").mkdir()
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("seed: 0\n")
    (folder / "prompts.csv").write_text("caption,key\nfox,0\n")
    places = {
        "tmp": folder / "empty",
        "shards": corpus,
        "pipeline": pipeline_folder,
        "xl": xl_folder,
        "prompts": folder / "prompts.csv",
        "run": folder / "run",
    }
    commands = [*HELP, *([word.format(**places) for word in argv] for argv, _ in REFUSED)]
    return places, run(commands, folder)


@pytest.mark.parametrize("number", range(len(HELP)), ids=[" ".join(argv) for argv in HELP])
def test_help_imports_nothing_heavy(answers, number):
    code, said, heavy = answers[1][number]
    assert not code and heavy == [] and "memtrain" in said


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=[" ".join(argv) for argv, _ in REFUSED])
def test_what_is_wrong_is_said_before_anything_heavy_is_imported(answers, number):
    places, told = answers
    code, said, heavy = told[len(HELP) + number]
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert REFUSED[number][1].format(**places) in said
    assert heavy == []
    assert list(places["tmp"].iterdir()) == []  # nothing was written
