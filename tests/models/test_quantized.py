"""An adapter beside weights in few bits: what it learns is what it would beside these weights, whole."""

import sys

import pytest
import torch
from torch import nn

from memtrain.demo import PIPELINE
from memtrain.models.adapters import Adapter
from memtrain.models.base import trained_parameters
from memtrain.models.pretrained import from_pretrained
from memtrain.models.quantized import can_be_packed, packed_bytes
from memtrain.training.checkpoint import checkpoint
from tests.conftest import build_data, build_module, fit, weights
from tests.support.adapters import low_rank

PLAIN = dict(train_text_encoder=False, gradient_checkpointing=False, channels_last=False, compile=False)


def whole(layer: nn.Linear) -> torch.Tensor:
    """The weights that a layer in few bits stands for, by the formats' definitions, (out, in) float32."""
    weight = layer.weight
    if weight.dtype == torch.int8:
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return weight.data.float() * scales[:, None] / 127
    state, codes = weight.quant_state, weight.data.flatten()
    codes = torch.stack([codes >> 4, codes & 15], dim=1).flatten()[: state.shape.numel()].long()
    scales = state.absmax.repeat_interleave(state.blocksize)[: len(codes)]
    return (state.code[codes] * scales).reshape(state.shape)


def packed(network: nn.Module) -> dict[str, nn.Linear]:
    """The layers whose weights are in few bits, by the names that they have without an adapter."""
    found = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    few = {name: layer for name, layer in found.items() if not layer.weight.is_floating_point()}
    return {name.removesuffix(".base_layer"): layer for name, layer in few.items()}


@pytest.mark.parametrize(("kind", "apart"), [("nf4", 1e-4), ("int8", 3e-2)])
def test_an_adapter_learns_what_it_would_beside_the_same_weights_whole(kind, apart):
    """int8 rounds what goes into a layer, too."""
    plain, few = (from_pretrained(str(PIPELINE), "auto", quantization=bits, **PLAIN) for bits in (None, kind))
    layers = packed(few.unet)
    assert len(layers) > 20 and all(can_be_packed(plain.unet.get_submodule(name), kind) for name in layers)
    for name, layer in layers.items():
        own, stands_for = plain.unet.get_submodule(name).weight.data, whole(layer)
        assert (stands_for - own).abs().mean() < 0.12 * own.abs().mean(), name
        scales = layer.weight.SCB if kind == "int8" else layer.weight.quant_state.absmax
        assert layer.weight.nbytes + scales.nbytes == packed_bytes(own.shape, kind), name
        own.copy_(stands_for)
    assert few.unet.conv_in.weight.dtype == torch.float32

    gradients = []
    for model in (few, plain):
        adapter = low_rank()
        adapter.attach(model, 3)
        model.prepare_frozen(torch.float32)
        adapter.prepare_frozen(torch.float32)
        generator = torch.Generator().manual_seed(0)
        for parameter in trained_parameters(model):
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        latents = torch.randn(2, *model.own_shape, generator=generator)
        prediction = model.predict(latents, torch.tensor([10, 600]), model.encode(["fox", "two-hump camel"]))
        prediction.square().sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trained_parameters(model)]))
    assert (gradients[0] - gradients[1]).norm() < apart * gradients[1].norm()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_run_leaves_the_weights_in_few_bits_as_they_are_and_goes_on_bit_for_bit(corpus, tmp_path, kind):
    def run(**options):
        module = build_module(PIPELINE, adapter=low_rank(), model={"quantization": kind})
        begun = {name: whole(layer) for name, layer in packed(module.model.unet).items()}
        fit(module, build_data(corpus, 2), tmp_path, 2, callbacks=[checkpoint(1, str(tmp_path))], **options)
        return module, begun

    first, begun = run()
    after = packed(first.model.unet)
    assert begun and all(torch.equal(whole(after[name]), value) for name, value in begun.items())
    rest, _ = run(ckpt_path=str(tmp_path / "step-00000001.ckpt"))
    assert torch.equal(weights(rest), weights(first))
    first.export(tmp_path / "export", torch.float32)
    stock = first.model.pipeline().__class__.from_pretrained(PIPELINE, dtype=torch.float32)
    stock.load_lora_weights(tmp_path / "export")
    names = {name for name, _ in stock.unet.named_parameters() if "lora_" in name}
    assert len(names) == len(trained_parameters(first.model))


def test_what_cannot_be_had_is_refused_in_a_line(pipeline_folder, monkeypatch):
    with pytest.raises(ValueError, match=r"quantization=nf4 is of weights that stay .* say adapter=lora, or leave it"):
        Adapter().check_quantization("nf4")
    with pytest.raises(ValueError, match=r"adapter.merge=true would add .*quantization=int8\); export it as it"):
        low_rank(merge=True).check_quantization("int8")
    with pytest.raises(ValueError, match=r"model.quantization must be one of nf4, int8, or null, got fp8"):
        low_rank().check_quantization("fp8")
    module = build_module(pipeline_folder, adapter=low_rank(), model={"quantization": "nf4"})
    module._device_mesh = {"data_parallel": None}
    with pytest.raises(ValueError, match=r"trainer=fsdp does not shard model.quantization=nf4; leave it out, or use"):
        module.configure_model()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"nf4 needs bitsandbytes: pip install bitsandbytes, or leave it out"):
        low_rank().check_quantization("nf4")
