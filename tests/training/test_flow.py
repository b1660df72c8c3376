"""Training on a rectified flow: Stable Diffusion 3, tiny, on real tars."""

import copy
import math

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from memtrain import detect
from memtrain.audit.denoiser import Denoiser
from memtrain.callbacks.export import Export
from memtrain.callbacks.validation import Validation
from memtrain.cli import schema
from memtrain.core.exclusion import FixedThreshold
from memtrain.core.streams import Stream
from memtrain.training.checkpoint import checkpoint
from memtrain.training.strategy import FullySharded
from tests.conftest import build_data, build_module, fit, weights
from tests.support.adapters import low_rank
from tests.support.conf import CONF
from tests.support.families import stable_diffusion, stable_diffusion_3
from tests.support.rules import quick_evidence
from tests.support.training import KillAt, Killed, Record
from tests.support.worlds import flat


def composed(folder, *overrides):
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(
            "train", ["data.shards=x", "model=stable_diffusion_3", f"model.pretrained='{folder}'", *overrides]
        )
    return instantiate(cfg.model)


def test_gradient_and_score_are_those_of_a_step_made_by_hand(flow_folder, corpus):
    """x_t = (1 - sigma) x_0 + sigma eps, the network told 1000 sigma, loss on eps - x_0; d is (1 - sigma) |dv|."""
    module = build_module(flow_folder, caption_dropout=0.0)
    data, model = build_data(corpus), module.model
    batch = data.decode([0, 1, 2, 3])
    visit = module.predictor.visit(batch, 5, Stream.TRAIN)
    loss, observed = visit.found.loss, visit.observed
    loss.sum().backward()

    stock = Denoiser.load(str(flow_folder), device="cpu").model.pipeline()
    transformer, vae = stock.transformer, stock.vae
    draws = module.predictor.draw(Stream.TRAIN, 5, batch.place.tolist(), module.latent_shape)
    with torch.no_grad():
        posterior = vae.encode(batch.images / 127.5 - 1).latent_dist
        sampled = posterior.mean + posterior.std * draws.posterior_noise
        clean = (sampled - vae.config.shift_factor) * vae.config.scaling_factor
        cond, null, pooled, null_pooled = stock.encode_prompt(batch.captions, None, None, device="cpu")
    sigma = ((draws.timesteps + 1) / 1000)[:, None, None, None]
    noisy, told = (1 - sigma) * clean + sigma * draws.noise, sigma.flatten() * 1000
    v = transformer(noisy, cond, pooled, told).sample
    by_hand = (v - (draws.noise - clean)).square().mean(dim=(1, 2, 3))
    by_hand.sum().backward()
    torch.testing.assert_close(loss, by_hand, atol=1e-5, rtol=1e-5)
    own = dict(transformer.named_parameters())
    for name, parameter in model.transformer.named_parameters():
        torch.testing.assert_close(parameter.grad, own[name].grad, atol=1e-5, rtol=1e-3)
        assert parameter.grad is not None and parameter.requires_grad
    with torch.no_grad():
        score = (1 - sigma.flatten()) * (v - transformer(noisy, null, null_pooled, told).sample).flatten(1).norm(dim=1)
    torch.testing.assert_close(observed.score, score, atol=1e-4, rtol=1e-4)
    assert not any(p.requires_grad for part in (model.vae, *model.text_encoders) for p in part.parameters())


def test_where_all_is_noise_a_row_says_nothing(flow_folder, corpus):
    module = build_module(flow_folder)
    latents = torch.randn(2, *module.latent_shape, generator=torch.Generator().manual_seed(0))
    told = module.predictor.encode(["fox", "fox"], module.model.encode)
    with torch.no_grad():
        found = module.predictor.predict_and_score(latents, -latents, torch.tensor([999, 998]), told)
    assert found.score[0] == 0 and found.score[1] > 0 and found.loss.isfinite().all()


def test_a_run_excludes_exports_a_stock_folder_and_what_it_trained_is_what_is_audited(flow_folder, corpus, tmp_path):
    module, record = build_module(flow_folder, FixedThreshold(0.5), ema_decay=0.0), Record()
    before = copy.deepcopy(module.model.state_dict())
    fit(module, build_data(corpus), tmp_path, 3, callbacks=[record, Export(dtype="float32")])
    for observed, kept in zip(record.observed, record.kept, strict=True):
        assert torch.equal(kept, ~observed.known | (observed.score <= 0.5))
    assert any(not kept.all() for kept in record.kept)
    for name, value in module.model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("transformer.") or "pos_embed" in name, name
    options = dict(num_images_per_prompt=2, num_inference_steps=3)
    exported = detect(Denoiser.load(str(tmp_path / "export"), device="cpu"), ["fox", "cat"], **options)
    assert exported.scores == pytest.approx(detect(module.model.pipeline(), ["fox", "cat"], **options).scores)


def test_a_run_that_was_killed_goes_on_as_the_whole_one(flow_folder, corpus, tmp_path):
    def train(folder, *callbacks, ckpt_path=None):
        module = build_module(flow_folder, quick_evidence())
        fit(module, build_data(corpus), folder, 4, callbacks=[checkpoint(2, folder), *callbacks], ckpt_path=ckpt_path)
        return module

    whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "cut", KillAt(3))
    gone_on = train(tmp_path / "cut", ckpt_path=str(tmp_path / "cut" / "last.ckpt"))
    assert torch.equal(weights(whole), weights(gone_on))
    assert torch.equal(whole.exclusion.evidence, gone_on.exclusion.evidence)


CUTS = {"cut": (2, 2, False), "sharded": (2, 1, True)}  # ranks, micro-batches, and whether weights are sharded


def train(pipeline: str, corpus: str, out: str, ranks: int, accumulate: int, sharded: bool) -> None:
    module = build_module(pipeline, quick_evidence(), model=dict(train_text_encoder=True))
    strategy = FullySharded(process_group_backend="gloo") if sharded else None
    data = build_data(corpus, 8 // ranks // accumulate)
    looks = [Validation(3, 2, 2, 0.5, 4), Export("float32")]
    fit(module, data, out, 3, accumulate, looks, ranks=ranks, strategy=strategy)
    torch.save(flat(module.trained_parameters()), f"{out}/{module.global_rank}.pt")


def train_a_rank(pipeline: str, corpus: str, out: str) -> None:
    for name, cut in CUTS.items():
        train(pipeline, corpus, f"{out}/{name}", *cut)


@pytest.mark.slow
def test_ranks_and_micro_batches_train_what_one_process_does(forks, pipeline_folder, corpus, tmp_path):
    """The CLIPs too, beside a T5 that is left as it is; one of the cuts is sharded."""
    folder = tmp_path / "pipeline"
    stable_diffusion_3(stable_diffusion(pipeline_folder), t5=True).save_pretrained(folder)
    for name in ("one", *CUTS):
        (tmp_path / name).mkdir()
    forks.call(train_a_rank, folder, corpus, tmp_path, log=tmp_path / "log", ranks=2)
    train(folder, corpus, str(tmp_path / "one"), 1, 1, False)
    one = torch.load(tmp_path / "one" / "0.pt")
    for other in ("cut/0", "cut/1", "sharded/0", "sharded/1"):
        torch.testing.assert_close(torch.load(tmp_path / f"{other}.pt"), one, atol=2e-6, rtol=0)
    assert (one - weights(build_module(folder, model=dict(train_text_encoder=True)))).abs().max() > 1e-3


def test_an_adapter_is_trained_exported_and_loaded_again(flow_folder, corpus, tmp_path):
    module = build_module(flow_folder, adapter=low_rank(alpha=32.0), ema_decay=0.0)
    fit(module, build_data(corpus), tmp_path, 3, callbacks=[Export(dtype="float32")])
    options = dict(num_images_per_prompt=1, num_inference_steps=3)
    own = Denoiser.load(str(flow_folder), device="cpu", lora=str(tmp_path / "export"))
    base = Denoiser.load(str(flow_folder), device="cpu")
    found = detect(own, ["fox", "cat"], **options).scores
    assert found == pytest.approx(detect(module.model.pipeline(), ["fox", "cat"], **options).scores, abs=1e-5)
    assert (abs(found - detect(base, ["fox", "cat"], **options).scores) > 1e-5).all()


def test_sigma_is_drawn_as_the_config_says(flow_folder):
    def median(*overrides):
        process, generator = composed(flow_folder, *overrides).noise_process, torch.Generator().manual_seed(0)
        drawn = torch.stack([process.draw_timestep(generator) for _ in range(2000)])
        return process.noise_level(drawn).median().item()

    assert median() == pytest.approx(0.75, abs=0.02)  # 3 / 2 / (1 + 2 / 2): the pipeline's shift
    assert median("model.shift=1.0") == pytest.approx(0.5, abs=0.02)
    logit = 1 / (1 + math.exp(-1.0))
    assert median("model.shift=1.0", "model.logit_mean=1.0") == pytest.approx(logit, abs=0.02)
    assert median("model.shift=1.0", "model.density=uniform") == pytest.approx(0.5, abs=0.04)


def test_a_pipeline_of_another_process_is_refused(pipeline_folder):
    with pytest.raises(Exception, match=r"is a StableDiffusionPipeline; say model=stable_diffusion"):
        composed(pipeline_folder)
