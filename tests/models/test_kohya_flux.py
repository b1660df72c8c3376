"""Adapters of Flux.1 in kohya-ss' form are read by diffusers as they were written."""

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from memtrain import detect
from memtrain.audit.denoiser import Denoiser
from memtrain.models.adapters import targets
from memtrain.models.kohya_flux import to_kohya, without_name
from tests.support.adapters import adapted, moved

FEW = dict(num_images_per_prompt=1, num_inference_steps=2)


def test_every_layer_of_blocks_of_the_real_width_comes_back(tmp_path):
    """diffusers knows fused layers of that width alone; here of one block of each kind, whose weights are nowhere."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    found = targets({"transformer": transformer}, ["linear"])["transformer"]
    layers = [layer for layer in found if without_name([layer]) is None]
    assert len(layers) == 20 and {layer.split(".")[0] for layer in layers} == {
        "transformer_blocks", "single_transformer_blocks",
    }  # fmt: skip
    state, generator = {}, torch.Generator().manual_seed(0)
    for layer in layers:
        outputs, inputs = transformer.get_submodule(layer).weight.shape
        state[f"{layer}.lora_A.weight"] = torch.randn(2, inputs, generator=generator)
        state[f"{layer}.lora_B.weight"] = torch.randn(outputs, 2, generator=generator)
    written = to_kohya(state, lambda layer: transformer.get_submodule(layer).out_features)
    save_file(written, tmp_path / "lora.safetensors")
    read = FluxPipeline.lora_state_dict(str(tmp_path / "lora.safetensors"))
    read = {key.removeprefix("transformer."): tensor for key, tensor in read.items()}
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in state.items())


def test_a_part_without_an_adapter_is_left_as_it_is():
    layer = "transformer_blocks.3.attn.to_k"
    state = {f"{layer}.lora_A.weight": torch.ones(2, 4), f"{layer}.lora_B.weight": torch.ones(4, 2)}
    written = to_kohya(state, lambda part: 4)
    name = "lora_unet_double_blocks_3_img_attn_qkv"
    delta = written[f"{name}.lora_up.weight"] @ written[f"{name}.lora_down.weight"]  # (q, k and v, inputs)
    assert written[f"{name}.alpha"] == 6 and delta.sum(dim=1).tolist() == [0] * 4 + [8] * 4 + [0] * 4


def test_a_tiny_one_is_loaded_by_both_forms(flux_folder, tmp_path):
    """Of layers whose width diffusers reads from the file, of CLIP too."""
    layers = ["add_q_proj", "add_v_proj", "to_add_out", "q_proj", "out_proj"]
    options = dict(target_modules=layers, text_encoder=True, alpha=2.0)
    model, adapter = moved(flux_folder, **options, formats=["diffusers", "kohya"])
    adapter.export(model, tmp_path, torch.float32)
    files = tmp_path, tmp_path / "kohya" / "lora.safetensors"
    expected = detect(model.pipeline(), ["fox"], **FEW).scores
    for file in files:
        own = Denoiser.load(str(flux_folder), device="cpu", lora=str(file))
        assert detect(own, ["fox"], **FEW).scores == pytest.approx(expected, rel=1e-4)
    assert any(key.startswith("lora_te") for key in load_file(files[1]))


def test_a_layer_that_has_no_name_is_said_before_training(flux_folder):
    with pytest.raises(ValueError, match=r"adapter.formats=kohya: diffusers reads no \w+.* from there; leave it out"):
        adapted(flux_folder, target_modules="linear", formats=["kohya"])
