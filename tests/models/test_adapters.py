"""Adapters begin as their base, train nothing of it, and come back from their files as they were."""

import copy
import re

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from memtrain.models.base import DiffusionModel, trained_parameters
from memtrain.models.lora_files import load_lora
from memtrain.models.pipelines import hash_weights
from memtrain.models.pretrained import from_pretrained
from tests.support.adapters import adapted, low_rank, moved

KINDS = {
    "attention": dict(),
    "linear": dict(target_modules="linear", text_encoder=True, alpha=2.0),
    "names": dict(target_modules=["to_q", "conv1", "out_proj"], text_encoder=True),
    "dora": dict(use_dora=True),
}


def stock(folder) -> StableDiffusionPipeline:
    options = dict(dtype=torch.float32, safety_checker=None, requires_safety_checker=False)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def predicted(unet, text_encoder, ids) -> torch.Tensor:
    noise = torch.Generator().manual_seed(0)
    latents, timesteps = torch.randn(3, 4, 8, 8, generator=noise), torch.tensor([5, 300, 900])
    return unet(latents, timesteps, text_encoder(ids)[0]).sample


def said_by(model: DiffusionModel) -> torch.Tensor:
    return predicted(model.unet, model.text_encoder, model.tokenize(["fox", "", "red apple"]))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_begins_as_the_base_and_as_a_function_of_the_seed(pipeline_folder, kind):
    base = stock(pipeline_folder)
    torch.manual_seed(1)
    model, _ = adapted(pipeline_folder, **KINDS[kind])
    ids = model.tokenize(["fox", "", "red apple"])
    assert torch.equal(said_by(model), predicted(base.unet, base.text_encoder, ids))
    drawn = torch.rand(1)
    again, _ = adapted(pipeline_folder, **KINDS[kind])
    other, _ = adapted(pipeline_folder, seed=8, **KINDS[kind])
    assert not torch.equal(torch.rand(1), drawn)  # nor is the seed put back
    assert all(map(torch.equal, trained_parameters(model), trained_parameters(again)))
    assert not all(map(torch.equal, trained_parameters(model), trained_parameters(other)))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_is_trained(pipeline_folder, kind):
    model, _ = adapted(pipeline_folder, **KINDS[kind])
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name for name in names)
    assert {name.split(".")[0] for name in names} == (
        {"unet", "text_encoder"} if KINDS[kind].get("text_encoder") else {"unet"}
    )
    assert len(trained_parameters(model)) == len(names)
    assert sum(p.numel() for p in trained_parameters(model)) < 0.5 * sum(p.numel() for p in model.unet.parameters())


def test_target_modules_are_attention_all_linear_layers_or_names(pipeline_folder):
    def layers(**options):
        names = [name for name, _ in adapted(pipeline_folder, **options)[0].unet.named_modules()]
        return {name.removesuffix(".lora_A") for name in names if name.endswith(".lora_A")}

    linear, attention = layers(target_modules="linear"), layers()
    assert {name.split(".attn")[1][2:] for name in attention} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert attention < linear and {"time_embedding.linear_1"} < linear
    assert layers(target_modules=["to_out.0"]) == {name for name in attention if name.endswith("to_out.0")}
    assert layers(target_modules="conv_in") == {"conv_in"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(rank=0), "adapter.rank must be >= 1, got 0; use adapter=none"),
        (dict(alpha=0.0), "adapter.alpha must be > 0, got 0; null"),
        (dict(dropout=1.0), r"adapter.dropout must be in \[0, 1\), got 1"),
        (dict(formats=["bin"]), "adapter.formats must be some of diffusers, kohya, got bin"),
        (dict(formats=[]), "adapter.formats must be some of diffusers, kohya, got none"),
        (dict(use_dora=True, formats=["kohya"]), "adapter.formats=kohya: diffusers reads no norms of adapter=dora"),
        (dict(use_dora=True, text_encoder=True), "adapter.text_encoder=true: diffusers reads no norms"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        low_rank(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(target_modules="attenton"), "attenton match no layer of the unet; say attention, linear, or some.*to_q"),
        (dict(target_modules=["to_q", "q_prj"]), "q_prj match no layer of the unet"),
        (dict(target_modules=[]), r"target_modules=\[\] match no layer"),
        (dict(target_modules=["to_q"], text_encoder=True), "to_q match no layer of the text_encoder; .*: .*q_proj"),
    ],
)
def test_target_modules_that_match_nothing_list_what_there_is(pipeline_folder, options, says):
    with pytest.raises(ValueError, match=says):
        adapted(pipeline_folder, **options)


def test_a_text_encoder_is_not_trained_twice(pipeline_folder):
    model = from_pretrained(str(pipeline_folder), "auto", True, False, False, False)
    with pytest.raises(ValueError, match=r"model.train_text_encoder=true.*say adapter.text_encoder=true"):
        low_rank().attach(model, 0)


def test_a_format_is_not_written_for_a_network_that_it_does_not_know(pipeline_folder):
    model = from_pretrained(str(pipeline_folder), "auto", False, False, False, False)
    model.network_name, model.transformer = "transformer", model.unet
    with pytest.raises(
        ValueError, match=r"adapter.formats=kohya is written for UNets and Flux.1, and this model has a transfor"
    ):
        low_rank(formats=["kohya"]).attach(model, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_exported_says_what_was_trained(pipeline_folder, tmp_path, kind):
    """Both files through the stock pipeline's `load_lora_weights`, and the merged pipeline as it is."""
    formats = ["diffusers"] if kind == "dora" else ["diffusers", "kohya"]
    model, adapter = moved(pipeline_folder, formats=formats, **KINDS[kind])
    ids, expected = model.tokenize(["fox", "", "red apple"]), said_by(model)
    assert (expected - said_by(adapted(pipeline_folder)[0])).abs().max() > 1e-2
    adapter.export(model, tmp_path / "export", torch.float32)
    files = [tmp_path / "export"] + [tmp_path / "export" / "kohya" / "lora.safetensors"] * (len(formats) - 1)
    for file in files:
        pipeline = stock(pipeline_folder)
        pipeline.load_lora_weights(str(file))
        torch.testing.assert_close(predicted(pipeline.unet, pipeline.text_encoder, ids), expected, atol=1e-6, rtol=1e-6)
        checked = stock(pipeline_folder)
        load_lora(checked, str(file))
        assert hash_weights(checked.unet) == hash_weights(pipeline.unet) != hash_weights(stock(pipeline_folder).unet)
    adapter.merge = True
    adapter.export(model, tmp_path / "merged", torch.float32)
    pipeline = stock(tmp_path / "merged")
    assert not any("lora" in name for name, _ in pipeline.unet.named_parameters())
    torch.testing.assert_close(predicted(pipeline.unet, pipeline.text_encoder, ids), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(said_by(model), expected)  # the model itself is as it was


def test_pictures_of_the_exported_adapter_are_those_of_the_model(pipeline_folder, tmp_path):
    model, adapter = moved(pipeline_folder)
    adapter.export(model, tmp_path, torch.float32)
    theirs, own = stock(pipeline_folder), model.pipeline()
    theirs.scheduler = own.scheduler
    plain = [copy.deepcopy(theirs), own, theirs]
    theirs.load_lora_weights(str(tmp_path))
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    without, expected, found = (
        torch.from_numpy(pipeline("fox", latents=start, num_inference_steps=2, output_type="np").images)
        for pipeline in plain
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (without - expected).abs().max() > 1e-3


def test_other_programs_find_the_keys_that_they_look_for(pipeline_folder, tmp_path):
    model, adapter = moved(pipeline_folder, text_encoder=True, alpha=2.0, formats=["diffusers", "kohya"])
    adapter.export(model, tmp_path, torch.float16)
    state = load_file(tmp_path / "kohya" / "lora.safetensors")
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in state
    assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_up.weight" in state
    assert {key.rsplit(".", 2)[-2] for key in state if not key.endswith(".alpha")} == {"lora_down", "lora_up"}
    assert all(tensor == 4 for key, tensor in state.items() if key.endswith(".alpha"))  # B has alpha / rank in it
    state = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    trained = model.unet.get_submodule(layer).lora_B["default"].weight
    torch.testing.assert_close(state[f"unet.{layer}.lora_B.weight"].float(), trained.detach() / 2, atol=1e-3, rtol=1e-3)


def test_what_is_frozen_is_cast_and_the_adapter_is_not(pipeline_folder):
    model, adapter = adapted(pipeline_folder, text_encoder=True)
    model.prepare_frozen(torch.bfloat16)
    adapter.prepare_frozen(torch.bfloat16)
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        prediction = model.predict(torch.randn(2, 4, 8, 8), torch.tensor([1, 900]), model.encode(["fox", ""]))
    prediction.float().square().mean().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in trained_parameters(model))


def test_dropout_is_of_trained_forwards_alone(pipeline_folder):
    model, _ = moved(pipeline_folder, dropout=0.5)
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([500]), model.null(1)
    assert not torch.equal(model.predict(*inputs), model.predict(*inputs))
    with torch.no_grad():
        assert torch.equal(model.predict(*inputs), model.predict(*inputs))


def test_a_file_that_does_not_fit_is_named_by_its_first_key(pipeline_folder, tmp_path):
    model, adapter = moved(pipeline_folder)
    adapter.export(model, tmp_path, torch.float32)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    state = load_file(file)
    key = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k.lora_A.weight"

    def refused(changed: dict) -> str:
        save_file(changed, tmp_path / "changed.safetensors")
        with pytest.raises(ValueError, match="cannot be loaded") as raised:
            load_lora(stock(pipeline_folder), str(tmp_path / "changed.safetensors"))
        assert "\n" not in str(raised.value) and str(raised.value).startswith(f"lora={tmp_path}/changed.safetensors")
        return str(raised.value)

    assert re.search(rf"{key} \(4, 99\) does not fit: that layer has", refused(state | {key: torch.zeros(4, 99)}))
    assert (
        "unet.deep.to_q.lora_A.weight (4, 8) does not fit: there is no such layer; it was made for another"
        in refused(
            state
            | {"unet.deep.to_q.lora_A.weight": torch.zeros(4, 8), "unet.deep.to_q.lora_B.weight": torch.zeros(8, 4)}
        )
    )
    assert "transformer.to_q.lora_A.weight is of no network of a StableDiffusionPipeline" in refused(
        {"transformer.to_q.lora_A.weight": torch.zeros(4, 8)}
    )
    assert "lora_unet_to_q.dora_scale, norms of DoRA" in refused({"lora_unet_to_q.dora_scale": torch.zeros(8)})
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ValueError, match=f"lora={tmp_path} cannot be loaded"):
        load_lora(stock(pipeline_folder), str(tmp_path))


def test_what_was_loaded_and_how_strongly_are_part_of_the_fingerprint(pipeline_folder, tmp_path):
    model, adapter = moved(pipeline_folder)
    adapter.export(model, tmp_path, torch.float32)
    pipeline = stock(pipeline_folder)
    load_lora(pipeline, str(tmp_path))
    seen = {hash_weights(pipeline.unet)}
    pipeline.set_adapters(pipeline.get_active_adapters(), 0.5)
    seen.add(hash_weights(pipeline.unet))
    pipeline.disable_lora()
    seen.add(hash_weights(pipeline.unet))
    assert len(seen) == 3
