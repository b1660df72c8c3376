"""Training of transformers on a rectified flow, by the folder: steps, cache, export and adapter."""

import copy

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from memtrain import detect
from memtrain.audit.denoiser import Denoiser
from memtrain.audit.detect.anchored import Anchored
from memtrain.callbacks.export import Export
from memtrain.callbacks.sample_grid import SampleGrid
from memtrain.cli import schema
from memtrain.core.streams import Stream
from memtrain.models.folders import check_pipeline, trained
from tests.conftest import build_data, build_module, fit, weights
from tests.support.adapters import adapted, low_rank
from tests.support.conf import CONF
from tests.support.flows import few_tokens, scaled, velocity  # noqa: F401
from tests.support.training import Record
from tests.training.test_latent_cache import data, write

FOLDERS = {"flux": "flux_folder", "flux2_klein": "klein_folder"}
FEW = dict(num_images_per_prompt=1, num_inference_steps=3)


pytestmark = pytest.mark.usefixtures("few_tokens")


@pytest.fixture(scope="module", params=FOLDERS)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(request, family):
    return request.getfixturevalue(FOLDERS[family])


def configured(family, folder, *overrides):
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["data.shards=x", f"model={family}", f"model.pretrained='{folder}'", *overrides])
    return instantiate(cfg.model)


def test_gradient_and_score_are_those_of_a_step_made_by_hand(folder, corpus):
    """x_t = (1 - sigma) x_0 + sigma eps, loss on eps - x_0; d is (1 - sigma) |dv|; guidance, where it is told, 1."""
    module = build_module(folder, caption_dropout=0.0)
    batch = build_data(corpus).decode([0, 1, 2])
    visit = module.predictor.visit(batch, 5, Stream.TRAIN)
    loss, observed = visit.found.loss, visit.observed
    loss.sum().backward()

    stock = Denoiser.load(str(folder), device="cpu").model.pipeline()
    draws = module.predictor.draw(Stream.TRAIN, 5, batch.place.tolist(), module.latent_shape)
    with torch.no_grad():
        clean = scaled(stock, batch.images, draws.posterior_noise)
    sigma = (draws.timesteps + 1) / 1000
    noisy = clean + sigma[:, None, None, None] * (draws.noise - clean)
    v = velocity(stock, noisy, sigma, batch.captions, 1.0)
    by_hand = (v - (draws.noise - clean)).square().mean(dim=(1, 2, 3))
    stock.transformer.zero_grad()
    by_hand.sum().backward()
    torch.testing.assert_close(loss, by_hand, atol=1e-5, rtol=1e-5)
    own = dict(stock.transformer.named_parameters())
    for name, parameter in module.model.transformer.named_parameters():
        torch.testing.assert_close(parameter.grad, own[name].grad, atol=1e-5, rtol=1e-3)
        assert parameter.grad is not None and parameter.requires_grad
    with torch.no_grad():
        null = velocity(stock, noisy, sigma, [""] * 3, 1.0)
    torch.testing.assert_close(observed.score, (1 - sigma) * (v - null).flatten(1).norm(dim=1), atol=1e-4, rtol=1e-4)
    model = module.model
    assert not any(p.requires_grad for part in (model.vae, *model.text_encoders) for p in part.parameters())


def test_cached_training_equals_training_from_pictures_and_its_export_is_audited(folder, corpus, tmp_path):
    write(folder, corpus, tmp_path / "cache")
    runs = []
    for cache in (None, str(tmp_path / "cache")):
        module, record = build_module(folder, ema_decay=0.0), Record()
        before = copy.deepcopy(module.model.state_dict())
        batches = data(corpus, cache=cache)
        batches.check_cache(module.model.fingerprint, False)
        looks = [record, Export(dtype="float32"), SampleGrid(0, ["fox"], 1, 2, 2.0)]
        fit(module, batches, tmp_path / "run", 2, callbacks=looks)
        runs.append((weights(module), record))
    (plain, plain_record), (cached, cached_record) = runs
    torch.testing.assert_close(cached, plain, atol=2e-5, rtol=0)
    for one, other in zip(plain_record.observed, cached_record.observed, strict=True):
        torch.testing.assert_close(one.score, other.score, atol=1e-3, rtol=1e-3)
    for name, value in module.model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("transformer."), name
    exported = detect(Denoiser.load(str(tmp_path / "run" / "export"), device="cpu"), ["fox"], **FEW)
    assert exported.scores == pytest.approx(detect(module.model.pipeline(), ["fox"], **FEW).scores, rel=1e-4)


def test_an_adapter_is_trained_exported_and_loaded_again(folder, corpus, tmp_path):
    module = build_module(folder, adapter=low_rank(), ema_decay=0.0)
    fit(module, build_data(corpus), tmp_path, 2, callbacks=[Export(dtype="float32")])
    own, base = (Denoiser.load(str(folder), device="cpu", lora=lora) for lora in (str(tmp_path / "export"), None))
    found = detect(own, ["fox", "cat"], **FEW).scores
    assert found == pytest.approx(detect(module.model.pipeline(), ["fox", "cat"], **FEW).scores, abs=1e-5)
    assert (abs(found - detect(base, ["fox", "cat"], **FEW).scores) > 1e-6).all()
    made = (own, Anchored.without_adapter(own)), (own, Anchored.against(base)), (base, Anchored.against(base))
    off, against, itself = (detect(model, ["fox"], scores=[score], **FEW).scores.item() for model, score in made)
    assert off == pytest.approx(against, rel=1e-3) and off > 100 * itself


def test_the_config_says_how_sigma_is_drawn_and_which_guidance_is_told(flux_folder):
    model = configured("flux", flux_folder, "model.shift=1.0", "model.density=uniform", "model.guidance=4.0")
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([model.noise_process.draw_timestep(generator, (4, 8, 8)) for _ in range(500)])
    assert model.noise_process.noise_level(drawn).median() == pytest.approx(0.5, abs=0.06)
    assert model.encode(["fox", ""]).guidance.tolist() == model.null(2).guidance.tolist() == [4.0, 4.0]
    with pytest.raises(Exception, match=r"model\.guidance must be >= 0, got -1; 1 is usual"):
        configured("flux", flux_folder, "model.guidance=-1")


def test_a_folder_of_another_family_is_refused(folder, family, pipeline_folder):
    with pytest.raises(ValueError, match=r"is a StableDiffusionPipeline; say model=stable_diffusion"):
        check_pipeline("model.pretrained", str(pipeline_folder), trained(family))
    with pytest.raises(ValueError, match=rf"say model={family}"):
        check_pipeline("model.pretrained", str(folder), trained("stable_diffusion_3"))


def test_a_text_encoder_that_stays_as_it_is_is_not_trained(klein_folder):
    says = r"=true: the text encoder of a Flux2Klein stays as it is; leave it out"
    with pytest.raises(ValueError, match=r"model\.train_text_encoder" + says):
        build_module(klein_folder, model=dict(train_text_encoder=True))
    with pytest.raises(ValueError, match=r"adapter\.text_encoder" + says):
        adapted(klein_folder, text_encoder=True)
