from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from memtrain.audit.alignment import ClipScore
from memtrain.audit.evaluate.fid import Distances, LatentGrid, ScriptFeatures
from memtrain.audit.evaluate.pictures import Pictures
from memtrain.audit.evaluate.similarity import LatentRmse, Sscd, sscd_pixels
from memtrain.core.statistics import kernel_distance
from memtrain.demo.make_base import caption_tokenizer
from tests.support.networks import Descriptor, scripted

CPU = torch.device("cpu")


class Inception(torch.nn.Module):
    """As StyleGAN's authors publish it: logits, or features where they are asked for."""

    def forward(self, pixels: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        values = pixels.float()
        return values.mean((2, 3)) if return_features else values.sum((1, 2, 3)).unsqueeze(1)


def pictures(count: int, height: int = 24, width: int = 24, seed: int = 0) -> Pictures:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, height, width, 3), generator=generator, dtype=torch.uint8).numpy()
    return Pictures(torch.randn(count, 4, 8, 8, generator=generator), pixels)


@pytest.fixture(scope="module")
def sscd_file(tmp_path_factory) -> str:
    return scripted(Descriptor(), tmp_path_factory.mktemp("sscd") / "sscd.torchscript.pt")


def triangle(length: int, wanted: int) -> np.ndarray:
    """(wanted, length) weights of bilinear resampling with antialiasing, from its definition."""
    scale = length / wanted
    support = max(scale, 1.0)
    centres = (np.arange(wanted)[:, None] + 0.5) * scale
    weights = np.clip(1 - np.abs(np.arange(length)[None] + 0.5 - centres) / support, 0, None)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    "shape, resize, wanted",
    [
        ((64, 64), "small_288", (288, 288)),
        ((400, 404), "small_288", (288, 290)),
        ((64, 100), "small_288", (288, 450)),
        ((700, 300), "small_288", (672, 288)),
        ((64, 100), "skew_320", (320, 320)),
    ],
)
def test_pictures_are_prepared_as_sscds_authors_do(shape, resize, wanted):
    pixels = pictures(2, *shape).pixels
    found = sscd_pixels(pixels, resize)
    rows, columns = triangle(shape[0], wanted[0]), triangle(shape[1], wanted[1])
    resized = np.einsum("ij,bjkc,lk->bcil", rows, pixels / 255, columns, optimize=True)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (resized - mean[:, None, None]) / std[:, None, None]
    assert found.shape == (2, 3, *wanted)
    assert np.abs(found.numpy() - expected).max() < 1.6 / 255 / 0.224  # Pillow rounds to whole levels, twice


@pytest.mark.parametrize("make", [LatentRmse, None])
def test_a_picture_is_nearest_to_itself(make, sscd_file):
    similarity = LatentRmse() if make else Sscd(sscd_file, CPU)
    features = similarity.features(pictures(5))
    itself = similarity.compare(features, features)
    other = similarity.compare(features, features.roll(1, dims=0))
    assert torch.allclose(itself, torch.full((5,), 0.0 if make else 1.0), atol=1e-6)
    assert (other > itself).all() if make else (other < itself).all()
    assert similarity.is_copy(itself.numpy(), similarity.bound).all()


def test_a_torchscript_file_is_sscd_by_dot_product_of_unit_vectors(sscd_file):
    one, other = pictures(3, seed=1), pictures(3, seed=2)
    sscd = Sscd(sscd_file, CPU, "skew_320")
    found = sscd.compare(sscd.features(one), sscd.features(other))
    vectors = [Descriptor()(sscd_pixels(p.pixels, "skew_320")).double() for p in (one, other)]
    dot = (vectors[0] * vectors[1]).sum(1) / (vectors[0].norm(dim=1) * vectors[1].norm(dim=1))
    assert torch.allclose(found.double(), dot, atol=1e-6)
    assert sscd.rule(0.5) == "SSCD > 0.5"


def test_a_stand_in_is_never_called_sscd():
    stand_in = LatentRmse()
    assert "sscd" not in f"{stand_in.name} {stand_in.column} {stand_in.rule(0.5)} {stand_in.identity()}".lower()


def test_the_cut_itself_is_a_copy_for_a_distance_alone(sscd_file):
    assert LatentRmse().is_copy(np.array([0.2, 0.25, 0.26]), 0.25).tolist() == [True, True, False]
    sscd = Sscd(sscd_file, CPU, min_sscd=0.7)
    assert sscd.is_copy(np.array([0.6, 0.7, 0.71]), 0.7).tolist() == [False, False, True]
    # the same cut in its own direction: of 100 the second highest is the first that may not count
    chance = torch.linspace(0, 0.9, 100)
    cut = sscd.in_own_terms(sscd.cut(chance, 0.01).distance)
    assert (chance > cut).sum() == 1 and chance[98] <= cut < chance[99]
    assert sscd.in_own_terms(sscd.cut(chance, 0.5).distance) == 0.7
    features = torch.nn.functional.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    values, which = sscd.nearest(features[:3], [features[3:5], features[5:]])
    slow = features[:3] @ features[3:].T
    assert which.tolist() == slow.argmax(dim=1).tolist()
    torch.testing.assert_close(values, slow.max(dim=1).values.double())
    assert LatentRmse().nearness(0.1) > LatentRmse().nearness(0.2)


def test_a_file_that_is_no_torchscript_is_refused_in_one_line(tmp_path, sscd_file):
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt")
    scripted(Inception(), tmp_path / "other.pt")
    for path, said in (
        (tmp_path / "missing.pt", "no such file"),
        (tmp_path / "empty.pt", "is no TorchScript file"),
        (tmp_path / "weights.pt", "is no TorchScript file"),
    ):
        for make in (Sscd, ScriptFeatures):
            with pytest.raises(ValueError, match=said) as raised:
                make(str(path), CPU)
            assert "\n" not in str(raised.value) and str(path) in str(raised.value)
    with pytest.raises(ValueError, match="sscd_resize must be one of small_288, skew_320, got 288"):
        Sscd(sscd_file, CPU, "288")
    with pytest.raises(ValueError, match="min_sscd must lie between -1 and 1"):
        Sscd(sscd_file, CPU, min_sscd=2)
    with pytest.raises(ValueError, match="max_rmse must be > 0"):
        LatentRmse(0)


def test_features_are_asked_of_a_network_that_has_logits_too(tmp_path):
    features = ScriptFeatures(scripted(Inception(), tmp_path / "inception.pt"), CPU)
    given = pictures(3)
    assert np.allclose(features(given).numpy(), given.pixels.mean((1, 2)), atol=1e-3)
    assert features.name == "FID (inception.pt)"


def test_the_frechet_distance_is_that_of_two_gaussians():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(400, 3, generator=generator)
    generated = 2 * torch.randn(300, 3, generator=generator) + 1
    distance = Distances()
    distance.add(real[:150], real=True)
    distance.add(real[150:], real=True)
    distance.add(generated, real=False)
    one, other = real.double().T.cov(), generated.double().T.cov()
    values, vectors = torch.linalg.eigh(one)
    root = vectors @ values.sqrt().diag() @ vectors.T
    both = torch.linalg.eigvalsh(root @ other @ root).sqrt().sum()  # tr sqrt(one other), without eigvals
    apart = (real.double().mean(0) - generated.double().mean(0)).square().sum()
    assert distance.frechet() == pytest.approx((apart + one.trace() + other.trace() - 2 * both).item(), rel=1e-4)
    assert distance.counts == {True: 400, False: 300}
    assert distance.kernel() == pytest.approx(kernel_distance(real, generated))


def test_a_frechet_distance_needs_two_pictures_on_either_side():
    distance = Distances()
    assert distance.frechet() is None and distance.kernel() is None
    distance.add(LatentGrid()(pictures(4)), real=True)
    distance.add(LatentGrid()(pictures(1)), real=False)
    assert distance.frechet() is None


def test_latent_features_tell_blur_from_detail_at_the_same_mean():
    detail = torch.tensor([1.0, -1.0]).repeat(4, 4, 8, 4)
    given = Pictures(torch.stack([detail[0], torch.zeros_like(detail[0])]), pictures(2).pixels)
    features = LatentGrid()(given)
    assert features.shape == (2, 2 * 4 * 16)
    assert torch.equal(features[0, :64], features[1, :64]) and (features[0, 64:] > features[1, 64:]).all()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """An untrained CLIP of a few thousand weights."""
    torch.manual_seed(0)
    tokenizer = caption_tokenizer(["fox on a teal background"])
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = dict(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(image_size=32, patch_size=8)
    config = CLIPConfig(text_config=size | text, vision_config=size | vision, projection_dim=8)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    square = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square).save_pretrained(folder)
    return folder


def test_the_clip_score_is_the_cosine_that_the_model_itself_compares_by(clip_folder):
    clip = ClipScore(str(clip_folder), CPU)
    captions = ["fox on a teal background", "x", "longer than all that the text encoder can see " * 5]
    given = pictures(3, 40, 56).pixels
    found = clip.scores(given, captions)
    images = clip.processor([Image.fromarray(image) for image in given], return_tensors="pt")
    text = clip.tokenizer(captions, padding="max_length", truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        output = clip.model(**images, **text)
    cosine = output.logits_per_image.diagonal() / clip.model.logit_scale.exp()
    assert torch.allclose(found, 100 * cosine.clamp(min=0), atol=1e-3)
    alone = torch.cat([clip.scores(given[n : n + 1], captions[n : n + 1]) for n in range(3)])
    assert torch.allclose(found, alone, atol=1e-3)


def test_what_is_no_clip_is_refused_in_one_line(tmp_path, pipeline_folder):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for folder, said in ((tmp_path, "it holds a bert model"), (pipeline_folder, "")):
        with pytest.raises(ValueError, match=f"clip={folder} cannot be loaded: {said}") as raised:
            ClipScore(str(folder), CPU)
        assert "\n" not in str(raised.value)
