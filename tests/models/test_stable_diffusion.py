import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline

from memtrain.models.pretrained import from_pretrained


def build(folder, **options):
    defaults = dict(train_text_encoder=False, gradient_checkpointing=False, channels_last=False, compile=False)
    return from_pretrained(str(folder), "auto", **(defaults | options))


def test_images_survive_the_way_to_latents_and_shapes_are_told(pipeline_folder):
    model = build(pipeline_folder)
    assert model.latent_shape(64, 64) == (4, 8, 8) and model.latent_shape(128, 64) == (4, 16, 8)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = model.sample_latents(*model.encode_posterior(images), noise)
    assert latents.shape == (3, 4, 8, 8) and not latents.requires_grad
    posterior = model.vae.encode(images.float() / 127.5 - 1).latent_dist
    expected = (posterior.mean + posterior.std * noise) * model.vae.config.scaling_factor
    torch.testing.assert_close(latents, expected.detach())


@pytest.mark.parametrize("resolution", [0, 60, 20, -64])
def test_a_resolution_that_the_unet_cannot_take_is_named(pipeline_folder, resolution):
    with pytest.raises(ValueError, match=rf"data.resolution must be a multiple of 16.*got {resolution}"):
        build(pipeline_folder).latent_shape(resolution, resolution)


def test_captions_are_encoded_as_the_stock_pipeline_encodes_them(pipeline_folder):
    model = build(pipeline_folder)
    captions = ["fox on a teal background", "", "a caption " * 40]
    hidden = model.encode(captions).hidden
    for row, caption in zip(hidden, captions, strict=True):
        expected, _ = model.pipeline().encode_prompt(caption, "cpu", 1, False)
        torch.testing.assert_close(row[None], expected)
    torch.testing.assert_close(model.null(1).hidden, hidden[1:2])


def test_the_null_caption_is_encoded_once_where_the_text_encoder_is_frozen(pipeline_folder):
    calls = []
    frozen, trained = build(pipeline_folder), build(pipeline_folder, train_text_encoder=True)
    for model in (frozen, trained):
        model.text_encoder.register_forward_hook(lambda *_: calls.append(1))
        for _ in range(3):
            assert not model.null(2).hidden.requires_grad
    assert len(calls) == 1 + 3


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_export_comes_back_the_same(pipelines, tmp_path, prediction_type):
    model = build(pipelines[prediction_type], channels_last=True)
    with torch.no_grad():
        for parameter in model.unet.parameters():
            parameter.add_(0.01)
    model.export(tmp_path / "export", torch.float32)
    back = build(tmp_path / "export")
    for (name, a), b in zip(model.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert back.noise_process.prediction_type == prediction_type
    assert not list((tmp_path / "export").rglob("*.bin"))
    model.export(tmp_path / "half", torch.float16)
    half = StableDiffusionPipeline.from_pretrained(tmp_path / "half", dtype=torch.float16, local_files_only=True)
    torch.testing.assert_close(half.unet.conv_in.weight.float(), model.unet.conv_in.weight, atol=1e-3, rtol=1e-3)
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # the model itself is as it was


def test_only_what_is_asked_for_is_trained(pipeline_folder):
    def trained(model):
        return {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}

    assert trained(build(pipeline_folder)) == {"unet"}
    assert trained(build(pipeline_folder, train_text_encoder=True)) == {"unet", "text_encoder"}
    model = build(pipeline_folder).train()
    assert model.unet.training and not model.vae.training and not model.text_encoder.training


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: shutil.rmtree(f / "unet"), "has no unet/"),
        (lambda f: (f / "model_index.json").unlink(), "is not a pipeline"),
        (lambda f: (f / "model_index.json").write_text("{"), "names no pipeline"),
        (lambda f: (f / "unet" / "config.json").write_text("{"), "cannot be loaded"),
        (
            lambda f: (f / "model_index.json").write_text(json.dumps({"_class_name": "PixArtSigmaPipeline"})),
            "is a PixArt",
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(pipeline_folder, tmp_path, spoil, says):
    folder = tmp_path / "spoilt"
    shutil.copytree(pipeline_folder, folder)
    spoil(folder)
    with pytest.raises(ValueError, match=f"{folder}.*{says}.*model.pretrained takes"):
        build(folder)


def test_another_prediction_type_is_refused(pipeline_folder, tmp_path):
    folder = tmp_path / "sample"
    shutil.copytree(pipeline_folder, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "sample"}))
    with pytest.raises(ValueError, match="predicts sample"):
        build(folder)
