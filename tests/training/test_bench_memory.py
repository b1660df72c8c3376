"""`memtrain bench memory`: what is computed without weights is what is there with them."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline

from memtrain.cli.main import main
from memtrain.models.adapters import Adapter
from memtrain.models.base import trained_parameters
from memtrain.models.conditioning import Conditioning
from memtrain.models.folders import trained
from memtrain.models.pretrained import from_pretrained
from memtrain.training.architectures import _KNOWN, _build, architecture
from memtrain.training.memory import AsOnGpu, Counted, measure, saved_by_a_step
from memtrain.training.optimizers import AdamW
from tests.support.adapters import low_rank

# weights of the networks that predict, as their authors and model cards give them
PUBLISHED = {
    "stable_diffusion_1": 859_520_964,
    "stable_diffusion_2": 865_910_724,
    "stable_diffusion_xl": 2_567_463_684,
    "stable_diffusion_3.5_medium": 2_243_171_520,
    "stable_diffusion_3.5_large": 8_056_627_520,
    "flux_1_dev": 11_901_408_320,
}
ADAMW = AdamW(1e-5, (0.9, 0.999), 0.01, 1e-8, "constant", 0, eight_bit=False)
PLAIN = dict(train_text_encoder=False, gradient_checkpointing=False, channels_last=False, compile=False)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_public_architecture_has_the_weights_that_are_published(name):
    parts = json.loads((_KNOWN / f"{name}.json").read_text())["parts"]
    network = _build(parts.get("unet") or parts["transformer"])
    assert sum(parameter.numel() for parameter in network.parameters()) == PUBLISHED[name]
    assert {path.stem for path in _KNOWN.glob("*.json")} == PUBLISHED.keys()


def saved_bytes(module, forward) -> int:
    """What a forward of real tensors saves: each storage once, those of weights not."""
    storages, own = {}, {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


def full(told: Conditioning) -> Conditioning:
    """Without zeros, of which a CPU takes one for all."""
    return replace(told, hidden=torch.ones_like(told.hidden))


@pytest.mark.parametrize("adapter", [Adapter, low_rank], ids=["none", "lora"])
@pytest.mark.parametrize("family", ["pipeline", "xl", "flow"])
def test_figures_are_those_of_a_real_step(request, family, adapter):
    """Weights, gradients and moments of a real step, and what its loss saves, to the byte."""
    folder = str(request.getfixturevalue(f"{family}_folder"))
    without = architecture(folder, trained("auto")).model()
    without.make_trainable(**PLAIN)
    assert next(without.parameters()).is_meta
    resolution = without.own_size[0]
    options = dict(resolution=resolution, batch_size=2, ema=False, gradient_checkpointing=False)
    found = measure(without, adapter(), ADAMW, dtype=torch.float32, **options)

    model = from_pretrained(folder, "auto", **PLAIN)
    adapter().attach(model, 0)
    noisy, timesteps = torch.zeros(2, *model.own_shape), torch.zeros(2, dtype=torch.long)
    told, losses = full(model.encode([""] * 2)), []

    def forward():
        prediction = model.predict(noisy, timesteps, told)
        losses.append((prediction.float() - noisy).square().flatten(1).mean(dim=1))

    assert found.activations == saved_bytes(model, forward)
    losses[0].sum().backward()
    optimizer, _ = ADAMW.build(trained_parameters(model), 1)
    optimizer.step()
    parameters = trained_parameters(model)
    assert found.trained == sum(parameter.numel() for parameter in parameters)
    assert found.gradients == sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert found.optimizer == sum(value.nbytes for value in moments)
    for name, size in found.weights.items():
        assert size == sum(parameter.nbytes for parameter in getattr(model, name).parameters()), name


def test_gradient_checkpointing_keeps_what_goes_into_blocks_and_one_of_them(flow_folder):
    """Against a forward of real tensors without it, whose blocks are told apart."""
    without = architecture(str(flow_folder), trained("auto")).model()
    without.make_trainable(**PLAIN)
    found = saved_by_a_step(without, 16, 2, torch.float32, gradient_checkpointing=True)

    model, within, saved, given = from_pretrained(str(flow_folder), "auto", **PLAIN), [None], {}, {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved.setdefault(within[0], {})[storage.data_ptr()] = storage
        return tensor

    def enter(block, arguments, named):
        within[0] = block
        given.update(
            {t.untyped_storage().data_ptr(): t.untyped_storage() for t in named.values() if torch.is_tensor(t)}
        )

    for block in model.transformer.transformer_blocks:
        block.register_forward_pre_hook(enter, with_kwargs=True)
        block.register_forward_hook(lambda *_: within.__setitem__(0, None))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        noisy = torch.zeros(2, *model.own_shape)
        prediction = model.predict(noisy, torch.zeros(2, dtype=torch.long), full(model.encode([""] * 2)))
        (prediction - noisy).square().flatten(1).mean(dim=1)
    outside = saved.pop(None)
    assert len(saved) == 2 and given
    kept = sum(storage.nbytes() for storage in (outside | given).values())
    largest = max(sum(storage.nbytes() for storage in block.values()) for block in saved.values())
    assert found == pytest.approx(kept + largest, rel=0.03)  # views of what goes in are counted once or twice


def test_a_lower_precision_casts_where_autocast_does_on_a_gpu():
    linear, norm = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)
    counted = Counted(linear.parameters())
    with AsOnGpu(torch.bfloat16), counted.saving():
        assert linear(torch.zeros(4, 8)).dtype == torch.bfloat16
        assert norm(torch.zeros(4, 8, dtype=torch.bfloat16)).dtype == torch.float32
    assert counted.bytes >= 4 * 8 * 2 + 4 * 8 * 4  # what goes in, in the precision that it is computed in


def test_the_command_says_what_fits(pipeline_folder, capsys):
    words = ["model=auto", f"model.pretrained={pipeline_folder}", "data.resolution=64", "data.batch_size=2"]
    main(["bench", "memory", *words, "adapter=lora", "trainer=fsdp", "trainer.devices=2", "--json"])
    sharded = json.loads(capsys.readouterr().out)
    main(["bench", "memory", *words, "adapter=lora", "trainer.precision=bf16-mixed", "ema.decay=0"])
    said = capsys.readouterr().out
    assert sharded["fits_gib"] == {"24": True, "40": True, "80": True}
    sizes = sharded["bytes"]
    assert sizes["all"] == sum(size for name, size in sizes.items() if name != "all")
    assert sizes["gradients"] == 4 * sharded["trained"] // 2 and sizes["optimizer"] == 2 * sizes["gradients"]
    assert "2 pictures of 64 px, bf16-mixed" in said and "24 GB card: fits, 40 GB card: fits" in said
    with pytest.raises(SystemExit):
        main(["bench", "memory", "model.pretrained=nobody/knows"])
    assert "its configs are not known here; name a local folder" in capsys.readouterr().err


def test_pipelines_without_a_part_are_built_without_it(flow_folder):
    own = DiffusionPipeline.load_config(str(flow_folder))
    assert own["text_encoder_3"] == [None, None]
    assert architecture(str(flow_folder), trained("auto")).model().text_encoder_names == (
        "text_encoder",
        "text_encoder_2",
    )
