"""A run that trains an adapter: its gradient, its checkpoints, its ranks."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch.func import functional_call

from memtrain.callbacks.export import Export
from memtrain.callbacks.validation import Validation
from memtrain.core.streams import Stream
from memtrain.models.base import trained_parameters
from memtrain.training.checkpoint import checkpoint
from memtrain.training.strategy import FullySharded, check_numbering
from tests.conftest import build_data, build_module, fit, weights
from tests.support.adapters import low_rank
from tests.support.rules import quick_evidence
from tests.support.training import Record
from tests.support.worlds import flat


def build(pipeline, **options):
    return build_module(pipeline, quick_evidence(), adapter=low_rank(**options))


def test_the_gradient_is_that_of_the_weights_with_the_adapter_added(pipeline_folder, corpus, tmp_path):
    """By hand: the stock UNet with W + (alpha / rank) B A in the place of W."""
    module, record = build_module(pipeline_folder, adapter=low_rank(alpha=2.0), caption_dropout=0.0), Record()
    fit(module, build_data(corpus), tmp_path, 2, callbacks=[record])  # so that B is no longer zero
    batch, model = record.window[0], module.model
    module.zero_grad()
    loss = module.predictor.visit(batch, 5, Stream.TRAIN).found.loss
    loss.sum().backward()

    unet = StableDiffusionPipeline.from_pretrained(pipeline_folder, dtype=torch.float32, local_files_only=True).unet
    own, given, by_hand = dict(unet.named_parameters()), {}, {}
    for name, parameter in model.unet.named_parameters():
        if parameter.requires_grad:
            by_hand[name] = parameter.detach().clone().requires_grad_()
    for name in by_hand:
        if ".lora_A." in name:
            layer = name.split(".lora_A.")[0]
            product = by_hand[name.replace(".lora_A.", ".lora_B.")] @ by_hand[name]
            given[f"{layer}.weight"] = own[f"{layer}.weight"].detach() + 2.0 / 4 * product
    mean, std = model.encode_posterior(batch.images)
    draws = module.predictor.draw(Stream.TRAIN, 5, batch.place.tolist(), mean.shape[1:])
    latents = model.sample_latents(mean, std, draws.posterior_noise)
    kept = model.scheduler.alphas_cumprod[draws.timesteps][:, None, None, None]  # of the signal
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * draws.noise
    hidden = model.encode(batch.captions).hidden
    prediction = functional_call(unet, given, (noisy, draws.timesteps, hidden)).sample
    (prediction - draws.noise).square().flatten(1).mean(dim=1).sum().backward()
    for name, parameter in model.unet.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, by_hand[name].grad, atol=1e-5, rtol=1e-4)
            assert parameter.grad.any(), name
        else:
            assert parameter.grad is None


@pytest.mark.parametrize(
    "options", [dict(dropout=0.3), dict(use_dora=True), dict(text_encoder=True)], ids=lambda o: next(iter(o))
)
def test_the_base_stays_and_a_resumed_run_goes_on_bit_for_bit(pipeline_folder, corpus, tmp_path, options):
    whole = build(pipeline_folder, **options)
    before = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    fit(whole, build_data(corpus), tmp_path, 4, callbacks=[checkpoint(2, str(tmp_path), keep=9)])
    changed = {name for name, tensor in whole.model.state_dict().items() if not torch.equal(tensor, before[name])}
    trained = {name for name, parameter in whole.model.named_parameters() if parameter.requires_grad}
    assert changed <= trained and len(changed) > 0.9 * len(trained)  # the end of the text encoder may say nothing

    path = tmp_path / "step-00000002.ckpt"
    saved = torch.load(path, weights_only=True)
    assert saved["state_dict"].keys() == {f"model.{name}" for name in trained}
    assert len(saved["memtrain"]["ema"]["shadow_params"]) == len(trained)
    base = sum(tensor.numel() for name, tensor in before.items() if name not in trained)
    assert path.stat().st_size < 4 * base  # which would be its float32 weights alone
    resumed = build(pipeline_folder, **options)
    fit(resumed, build_data(corpus), tmp_path, 4, callbacks=[checkpoint(9, str(tmp_path))], ckpt_path=str(path))
    assert torch.equal(weights(resumed), weights(whole))
    assert all(map(torch.equal, resumed.ema.shadow_params, whole.ema.shadow_params))
    ours, theirs = (module.exclusion.state_dict() for module in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if isinstance(ours[name], torch.Tensor))


def test_a_checkpoint_of_another_base_is_refused(pipeline_folder, corpus, tmp_path):
    fit(build(pipeline_folder), build_data(corpus), tmp_path, 1, callbacks=[checkpoint(1, str(tmp_path))])
    whole = build(pipeline_folder)
    with pytest.raises(ValueError, match="was not sharded, and trainer=fsdp cannot read its optimizer"):
        check_numbering(tmp_path / "last.ckpt", whole)
    other = build_module(pipeline_folder)
    with torch.no_grad():
        other.model.unet.conv_in.weight[0, 0, 0, 0] += 1e-3
    other.export(tmp_path / "other", torch.float32)
    with pytest.raises(ValueError, match=r"for another base, whose unet had other weights; name that base"):
        fit(build(tmp_path / "other"), build_data(corpus), tmp_path, 2, ckpt_path=str(tmp_path / "last.ckpt"))
    with pytest.raises(ValueError, match=r"not a checkpoint of this model: it lacks model\.unet\.conv_in"):
        fit(build_module(pipeline_folder), build_data(corpus), tmp_path, 2, ckpt_path=str(tmp_path / "last.ckpt"))


def train(pipeline: str, corpus: str, out: str, ranks: int, steps: int, last: str | None, name: str) -> None:
    """Until `steps`; where the name says so with all weights sharded, the frozen ones too."""
    module = build(pipeline, text_encoder=True)
    looks, strategy = [checkpoint(6, out)], None
    if name == "sharded":
        looks = [Validation(6, 2, 2, 0.5, 4), Export("float32"), *looks]
        strategy = FullySharded(process_group_backend="gloo")
    fit(module, build_data(corpus, 4 // ranks), out, steps, 1, looks, last, ranks, strategy)
    found = dict(weights=flat(module.trained_parameters()), average=flat(module.ema.shadow_params))
    found["scored"] = module.exclusion.reference.count.sum()
    torch.save(found, f"{out}/{name}-{module.global_rank}.pt")


def train_a_rank(pipeline: str, corpus: str, out: str) -> None:
    """Sharded ranks, too, which go on from a checkpoint of theirs."""
    train(pipeline, corpus, f"{out}/two", 2, 4, None, "two")
    train(pipeline, corpus, f"{out}/sharded", 2, 2, None, "sharded")
    train(pipeline, corpus, f"{out}/sharded", 2, 4, f"{out}/sharded/last.ckpt", "sharded")


@pytest.mark.slow
def test_two_ranks_train_the_adapter_that_one_trains(forks, pipeline_folder, corpus, tmp_path):
    for name in ("one", "two", "sharded"):
        (tmp_path / name).mkdir()
    forks.call(train_a_rank, pipeline_folder, corpus, tmp_path, log=tmp_path / "log", ranks=2)
    train(pipeline_folder, corpus, str(tmp_path / "one"), 1, 4, None, "one")
    one, *others = (
        torch.load(tmp_path / f"{name[:-2]}/{name}.pt")
        for name in ("one-0", "two-0", "two-1", "sharded-0", "sharded-1")
    )
    for other in others:
        for part in ("weights", "average"):
            torch.testing.assert_close(other[part], one[part], atol=1e-6, rtol=0)
    assert one["scored"] > 0
    begun = torch.cat(
        [p.detach().flatten() for p in trained_parameters(build(pipeline_folder, text_encoder=True).model)]
    )
    assert (one["weights"] - begun).abs().max() > 1e-3
