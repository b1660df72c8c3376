"""A model with an adapter loaded is audited as the stock pipeline that has it."""

import copy
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from memtrain.audit.denoiser import Denoiser, generation_seeds
from memtrain.audit.detect.anchored import Anchored
from memtrain.audit.detect.detection import SCORE_NAMES, detect
from memtrain.cli.main import main
from memtrain.models.lora_files import load_lora, write_lora
from tests.audit.conftest import PROMPTS
from tests.support.adapters import low_rank, moved
from tests.support.program import fails

SHORT = dict(num_images_per_prompt=2, num_scored_steps=2, num_inference_steps=4)


@pytest.fixture(scope="module")
def exported(pipeline_folder, tmp_path_factory):
    """The adapter's folder, and the pipeline that has it in its weights."""
    folder = tmp_path_factory.mktemp("lora")
    model, adapter = moved(pipeline_folder, text_encoder=True, formats=["diffusers", "kohya"])
    adapter.export(model, folder / "run" / "export", torch.float32)
    adapter.merge = True
    adapter.export(model, folder / "merged", torch.float32)
    return folder / "run" / "export", folder / "merged"


@pytest.fixture(scope="module")
def with_lora(pipeline_folder, exported) -> StableDiffusionPipeline:
    """As anybody would load it."""
    options = dict(dtype=torch.float32, safety_checker=None, requires_safety_checker=False)
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, local_files_only=True, **options)
    pipeline.load_lora_weights(str(exported[0]))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_loop(pipeline, prompt: str, seed: int) -> list[float]:
    """||noise predicted with the prompt - without||, at the first two steps of the stock pipeline's own path."""
    found = []
    hook = pipeline.unet.register_forward_hook(
        lambda unet, inputs, output: found.append((output[0][1] - output[0][0]).norm().item())
    )
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    pipeline(prompt, latents=start, num_inference_steps=4, guidance_scale=7.5, output_type="latent")
    hook.remove()
    return found[:2]


def test_the_scores_are_those_of_a_plain_loop_over_the_stock_pipeline_with_it(
    pipeline_folder, exported, with_lora, denoiser
):
    expected = [[plain_loop(with_lora, prompt, seed) for seed in generation_seeds(prompt, 2, 0)] for prompt in PROMPTS]
    kohya = exported[0] / "kohya" / "lora.safetensors"
    for own in (
        with_lora,
        Denoiser.load(str(pipeline_folder), "cpu", lora=str(exported[0])),
        Denoiser.load(str(pipeline_folder), "cpu", lora=str(kohya)),
    ):
        found = detect(own, PROMPTS, scores=SCORE_NAMES[:5], **SHORT)
        np.testing.assert_allclose(found.steps["magnitude"], expected, atol=1e-5, rtol=1e-5)
        own = own if isinstance(own, Denoiser) else Denoiser.of(own)
        assert own.fingerprint() != denoiser.fingerprint()
    without = detect(denoiser, PROMPTS, **SHORT)
    assert np.abs(without.steps["magnitude"] - expected).max() > 1e-2


def audit(command: str, model, corpus, out, *more: str) -> list[float]:
    """Figures that a command finds about a prompt or a sample."""
    common = [f"model={model}", f"out={out}", "device=cpu", "num_images_per_prompt=1", "num_inference_steps=2", *more]
    own = {
        "detect": [f"prompts={out}.txt"],
        "explain": ["prompt=fox on a teal background", "steps=[0]"],
        "mitigate": ["prompt=fox on a teal background", "method=random_tokens"],
        "evaluate": [
            f"data={corpus}",
            "samples.count=2",
            "timesteps_per_sample=1",
            "fid_samples=4",
            "gallery=1",
            "attack=embedding",
            "attack.steps=2",
            "attack.batch_size=2",
        ],
    }
    out.with_name(f"{out.name}.txt").write_text("\n".join(PROMPTS))
    main([command, *common, *own[command]])
    if command == "evaluate":
        [result] = json.loads((out / "evaluation.json").read_text())
        attacked = [row["latent_rmse"] for row in pq.read_table(out / "rows.parquet").to_pylist() if row["attacked"]]
        return [result["groups"][0][name] for name in ("denoising_loss", "similarity")] + attacked
    if command == "detect":
        return [row["score"] for row in json.loads((out / "summary.json").read_text())["top"]]
    found = json.loads((out / f"{command}.json").read_text())
    if command == "explain":
        return [found["prompts"][0]["score"]]
    return [score for method in found["methods"] for score in method["scores"]]


@pytest.mark.parametrize("command", ["detect", "explain", "mitigate", "evaluate"])
def test_a_command_finds_with_lora_what_it_finds_on_the_merged_pipeline(
    pipeline_folder, exported, corpus, tmp_path, command
):
    lora, merged = exported
    found = audit(command, pipeline_folder, corpus, tmp_path / "lora", f"lora={lora}")
    np.testing.assert_allclose(found, audit(command, merged, corpus, tmp_path / "merged"), atol=1e-4, rtol=1e-4)
    without = audit(command, pipeline_folder, corpus, tmp_path / "without")
    assert np.abs(np.array(found) - without).max() > 1e-3
    said = "".join(path.read_text() for path in (tmp_path / "lora").glob("*.json"))
    assert str(lora) in said


def test_several_models_are_evaluated_each_with_its_own(pipeline_folder, exported, corpus, tmp_path, capsys):
    lora, few = exported[0], ["samples.count=1", "timesteps_per_sample=1", "fid_samples=2", "gallery=1", "device=cpu"]
    few += ["num_images_per_prompt=1", "num_inference_steps=1", f"data={corpus}", f"out={tmp_path}/out"]
    main(["evaluate", f"models=[{pipeline_folder},{pipeline_folder}]", f"lora=[null,{lora}]", *few])
    base, adapted = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (base["model"], base["lora"]) == (pipeline_folder.name, None)
    assert (adapted["model"], adapted["lora"]) == ("run", str(lora))
    assert base["groups"][0]["denoising_loss"] != adapted["groups"][0]["denoising_loss"]
    said = fails(capsys, "evaluate", f"model={pipeline_folder}", f"lora=[null,{lora}]", *few)
    assert "lora names 2 adapters for 1 models; name one for each, or null" in said


def test_an_adapter_for_another_family_is_named_by_its_first_key(xl_pipeline, exported, tmp_path):
    with pytest.raises(ValueError, match=r"lora=.*does not fit: .*; it was made for another base"):
        load_lora(copy.deepcopy(xl_pipeline), str(exported[0]))
    adapter, unet = low_rank(formats=["diffusers", "kohya"]), copy.deepcopy(xl_pipeline.unet)
    adapter.give(unet, ["up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"], seed=0)
    write_lora(StableDiffusionXLPipeline, {"unet": unet}, 1.0, tmp_path, torch.float32, adapter.formats)
    for source in (tmp_path, tmp_path / "kohya" / "lora.safetensors"):
        own = copy.deepcopy(xl_pipeline)
        load_lora(own, str(source))
        assert detect(own, ["fox"], **SHORT).scores == pytest.approx(detect(xl_pipeline, ["fox"], **SHORT).scores)
        with pytest.raises(ValueError, match=r"lora=.*does not fit: .*; it was made for another base"):
            Denoiser.load(exported[1], "cpu", lora=str(source))


def anchored_loop(pipeline, base, prompt: str, seed: int) -> list[float]:
    """||noise predicted by the pipeline - by the base||, both with the prompt, at the pipeline's first two steps."""
    found, states = (
        [],
        base.text_encoder(base.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids)[0],
    )

    def compare(unet, inputs, output):
        with torch.no_grad():
            found.append((output[0][1] - base.unet(inputs[0][1:], inputs[1], states).sample[0]).norm().item())

    hook = pipeline.unet.register_forward_hook(compare)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    pipeline(prompt, latents=start, num_inference_steps=4, guidance_scale=7.5, output_type="latent")
    hook.remove()
    return found[:2]


def test_the_anchored_score_is_the_distance_to_the_pipeline_without_it(pipeline_folder, exported, with_lora, pipeline):
    own = Denoiser.of(with_lora)
    expected = [[anchored_loop(with_lora, pipeline, p, seed) for seed in generation_seeds(p, 2, 0)] for p in PROMPTS]
    found = detect(own, PROMPTS, scores=[Anchored.without_adapter(own)], **SHORT)
    np.testing.assert_allclose(found.steps["anchored"], expected, atol=1e-5, rtol=1e-5)
    assert found.evaluations == 2 * (2 * 2 + 2)  # a generation and step: the pair, and one more
    merged = Denoiser.load(str(exported[1]), "cpu")  # the same, of a whole model and its base
    found = detect(merged, PROMPTS, scores=[Anchored.against(pipeline), "magnitude"], **SHORT)
    np.testing.assert_allclose(found.steps["anchored"], expected, atol=1e-4, rtol=1e-4)
    assert detect(pipeline, PROMPTS[:1], scores=[Anchored.against(pipeline)], **SHORT).scores < 1e-4


def test_the_command_takes_a_base_or_the_adapter_off(pipeline_folder, exported, corpus, tmp_path, capsys):
    lora, merged = exported
    found = audit("detect", pipeline_folder, corpus, tmp_path / "off", f"lora={lora}", "scores=[anchored]")
    against = audit("detect", merged, corpus, tmp_path / "base", f"base={pipeline_folder}", "scores=[anchored]")
    np.testing.assert_allclose(found, against, atol=1e-4, rtol=1e-4)
    assert min(found) > 1e-2
    model = f"model={pipeline_folder}", f"prompts={tmp_path}/off.txt", f"out={tmp_path}/none"
    assert "say base=FOLDER or lora=PATH" in fails(capsys, "detect", *model, "scores=[anchored]")
    assert "base=/nowhere: no such" in fails(capsys, "detect", *model, "scores=[anchored]", "base=/nowhere")
    assert "is for the anchored score" in fails(capsys, "detect", *model, f"base={merged}")
