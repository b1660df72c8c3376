"""`memtrain train adapter=lora` and `memtrain detect lora=…`, as a user types them."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

import memtrain
from memtrain.cli.main import main
from tests.support.program import fails, small_run


def run_with(corpus, pipeline, runs, *more: str) -> list[str]:
    words = small_run(corpus, pipeline, runs, "adapter=lora", "run_id=one", *more, steps=2)
    return [word for word in words if word != "callbacks.export=null"]


def test_a_run_trains_an_adapter_that_detect_takes(pipeline_folder, corpus, tmp_path, capsys):
    formats = "adapter.formats=[diffusers,kohya]"
    main(run_with(corpus, pipeline_folder, tmp_path, "adapter.rank=4", "adapter.text_encoder=true", formats))
    run = tmp_path / "faults" / "one"
    assert not (run / "export" / "model_index.json").exists()
    (tmp_path / "p.txt").write_text("fox\nowl on a teal background\n")
    short = ["num_images_per_prompt=1", "num_inference_steps=2", f"prompts={tmp_path}/p.txt", "device=cpu"]
    scores = {}
    for name, lora in (("diffusers", run / "export"), ("kohya", run / "export" / "kohya" / "lora.safetensors")):
        main(["detect", f"model={pipeline_folder}", f"lora={lora}", f"out={tmp_path}/{name}", *short])
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        scores[name] = {row["prompt"]: row["score"] for row in summary["top"]}
        assert summary["lora"] == str(lora)
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, local_files_only=True, dtype=torch.float32)
    pipeline.load_lora_weights(str(run / "export"))
    found = memtrain.detect(pipeline, list(scores["kohya"]), num_images_per_prompt=1, num_inference_steps=2).scores
    for name in scores:
        assert [scores[name][prompt] for prompt in scores["kohya"]] == pytest.approx(found.tolist(), abs=1e-5)
    said = fails(capsys, "detect", f"model={run}/export", *short)
    assert f"is an adapter, not a pipeline; name its base there, and say lora={run}/export" in said


def test_a_merged_export_is_a_whole_pipeline(pipeline_folder, corpus, tmp_path):
    main(run_with(corpus, pipeline_folder, tmp_path, "adapter=dora", "adapter.merge=true"))
    folder = tmp_path / "faults" / "one" / "export"
    assert StableDiffusionPipeline.from_pretrained(folder, local_files_only=True).unet
    assert not list(folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("adapter.rank=0", "adapter.rank must be >= 1, got 0; use adapter=none to train all weights"),
        ("adapter.rnak=4", "rnak"),
        ("adapter.target_modules=[to_qq]", "adapter.target_modules=to_qq match no layer of the unet; say attention"),
        ("model.train_text_encoder=true", "say adapter.text_encoder=true for an adapter there"),
    ],
)
def test_what_is_wrong_is_one_line(pipeline_folder, corpus, tmp_path, capsys, argument, says):
    assert says in fails(capsys, *run_with(corpus, pipeline_folder, tmp_path, argument))
