"""Every family by every command, from the shell's words to the files that they promise: README's table."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from memtrain.cli.main import main
from tests.support.flows import few_tokens  # noqa: F401
from tests.support.program import small_run

FAMILIES = {
    "stable_diffusion": "pipeline_folder", "stable_diffusion_xl": "xl_folder", "stable_diffusion_3": "flow_folder",
    "flux": "flux_folder", "flux2_klein": "klein_folder",
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("few_tokens")
AUDITS = ["detect", "explain", "mitigate", "evaluate"]
QUICK = ["num_images_per_prompt=1", "num_inference_steps=2", "device=cpu"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, corpus, tmp_path_factory) -> tuple[Path, Path, Path]:
    """Cached, and trained from the cache, by its own choice: the corpus, its run, the model that the run exported."""
    corpus = corpus / "00000.tar"
    folder, pipeline = tmp_path_factory.mktemp(request.param), request.getfixturevalue(FAMILIES[request.param])
    model = [f"model={request.param}", f"model.pretrained={pipeline}"]
    main(["cache", *model, f"data.shards={corpus}", "data.resolution=64", "data.num_workers=0", f"out={folder}/cache"])
    words = small_run(corpus, pipeline, folder, f"model={request.param}", f"data.cache={folder}/cache", steps=4)
    main([word for word in words if "callbacks.export" not in word and "callbacks.canaries" not in word]
         + ["run_id=one", "exclusion.warmup=1"])  # fmt: skip
    run = folder / "faults" / "one"
    return corpus, run, run / "export"


def test_the_readme_promises_these_families_and_no_cell_more():
    rows = [line.split(" | ") for line in Path("README.md").read_text().splitlines() if line.startswith("| family |")
            or " | yes |" in line]  # fmt: skip
    assert [cell.strip(" |") for cell in rows[0][2:]] == ["train", "LoRA", "cache", *AUDITS]
    assert {row[1].strip("`") for row in rows[1:]} == set(FAMILIES)


def test_it_is_cached_and_trained(family):
    _, run, export = family
    assert (run / "checkpoints" / "last.ckpt").is_file() and (export / "model_index.json").is_file()
    assert list((run / "ledger").glob("*.parquet"))


def test_it_is_trained_by_an_adapter_which_is_audited(family, tmp_path):
    corpus, run, export = family
    name = OmegaConf.load(run / "config.yaml").model.family
    words = small_run(corpus, export, tmp_path, f"model={name}", "adapter=lora", "run_id=lora", steps=4)
    main([word for word in words if "callbacks.export" not in word])
    adapter = tmp_path / "faults" / "lora" / "export"
    assert (adapter / "pytorch_lora_weights.safetensors").is_file()
    main(["detect", f"model={export}", f"lora={adapter}", f"prompts={run}/canaries.csv", *QUICK, "num_scored_steps=1",
          f"out={tmp_path}/detect"])  # fmt: skip
    assert (tmp_path / "detect" / "scores.parquet").is_file()


def test_it_is_audited(family, tmp_path):
    corpus, run, export = family
    model, listed = f"model={export}", [f"prompts={run}/canaries.csv", "prompts.label=group"]
    main(["detect", model, *listed, *QUICK, "num_scored_steps=1", f"out={tmp_path}/detect"])
    main(["explain", model, "prompt=fox on a teal background", *QUICK, "steps=[0]", f"out={tmp_path}/explain"])
    main(["mitigate", model, "prompt=fox", "target=0.1", "method=embedding", "method.embedding.iterations=1", *QUICK,
          f"out={tmp_path}/mitigate"])  # fmt: skip
    main(["evaluate", model, f"data={corpus}", f"samples={run}/canaries.csv", *QUICK, "timesteps_per_sample=2",
          "fid_samples=8", "attack=embedding", "attack.steps=2", "attack.batch_size=2",
          f"out={tmp_path}/evaluate"])  # fmt: skip
    for name in ("detect/scores.parquet", "explain/explain.json", "mitigate/mitigate.json", "evaluate/evaluation.csv"):
        assert (tmp_path / name).is_file(), name
    (found,) = json.loads((tmp_path / "evaluate" / "evaluation.json").read_text())
    rows = pq.read_table(tmp_path / "evaluate" / "rows.parquet").to_pylist()
    plain, attacked = ([row for row in rows if row["attacked"] == way] for way in (False, True))
    assert [(row["key"], row["seed"]) for row in plain] == [(row["key"], row["seed"]) for row in attacked]
    assert all(one["latent_rmse"] != other["latent_rmse"] for one, other in zip(plain, attacked, strict=True))
    for group in found["groups"]:  # the cut is that of generations without an attack
        copies = [row["latent_rmse"] <= found["cut"] for row in attacked if row["group"] == group["group"]]
        assert group["copy_rate_attacked"] == pytest.approx(sum(copies) / len(copies))
    (page,) = (tmp_path / "evaluate").glob("*/gallery.html")
    assert "generation under attack" in page.read_text(encoding="utf-8")


def test_model_auto_trains_what_the_folder_says_that_it_is(family):
    """The network's inputs tell: of the larger family it is told of sizes."""
    from memtrain.models.families import FAMILIES as KNOWN
    from memtrain.models.pretrained import from_pretrained

    _, _, export = family
    name = json.loads((export / "model_index.json").read_text())["_class_name"]
    assert type(from_pretrained(str(export), "auto", False, False, False, False)) is KNOWN[name].load()
