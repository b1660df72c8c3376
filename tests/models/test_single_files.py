"""Models as one file: what is loaded is what the folder holds, and what a file lacks is named."""

import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from safetensors.torch import save_file

from memtrain import detect
from memtrain.audit.denoiser import Denoiser
from memtrain.cli import schema
from memtrain.cli.arguments import spelled
from memtrain.cli.main import main
from memtrain.models.folders import AUDITED, check_pipeline, trained
from memtrain.models.pipelines import load_pipeline
from memtrain.models.pretrained import from_pretrained
from tests.support.conf import CONF
from tests.support.families import stable_diffusion, stable_diffusion_xl
from tests.support.single_files import original_layout

FEW = dict(num_images_per_prompt=1, num_inference_steps=2)
PLAIN = (False, False, False, False)


@pytest.fixture(scope="module")
def files(pipeline_folder, xl_folder, flux_folder, tmp_path_factory) -> Path:
    """sd and xl of the first layout, flux with a transformer alone, as .safetensors and as folders without weights."""
    folder = tmp_path_factory.mktemp("files")
    base = stable_diffusion(pipeline_folder)
    for name, pipeline in (("sd", base), ("xl", stable_diffusion_xl(base))):
        save_file(original_layout(pipeline), folder / f"{name}.safetensors")
    shutil.copy(flux_folder / "transformer" / "diffusion_pytorch_model.safetensors", folder / "flux.safetensors")
    for name, whole in (("sd", pipeline_folder), ("xl", xl_folder), ("flux", flux_folder)):
        shutil.copytree(whole, folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.mark.parametrize(("name", "whole"), [("sd", "pipeline_folder"), ("xl", "xl_folder")])
def test_a_file_of_the_original_layout_is_its_folders_model(request, files, name, whole):
    """With configs and tokenizers of a folder that has no weights, and no hub."""
    file, config = str(files / f"{name}.safetensors"), dict(config=str(files / name))
    found = Denoiser.load(file, device="cpu", **config)
    expected = Denoiser.load(str(request.getfixturevalue(whole)), device="cpu")
    assert found.fingerprint() == expected.fingerprint()
    assert found.model.fingerprint() == expected.model.fingerprint()
    assert detect(found, ["fox"], **FEW).scores == pytest.approx(detect(expected, ["fox"], **FEW).scores, rel=1e-5)
    model = from_pretrained(file, "auto", *PLAIN, **config)
    assert model.fingerprint() == expected.model.fingerprint()
    assert all(weight.requires_grad for weight in model.unet.parameters())


def test_what_a_file_lacks_is_taken_from_the_config(files, flux_folder):
    """As of Flux.1, whose file mostly holds the transformer alone: here in diffusers' own names."""
    found = Denoiser.load(str(files / "flux.safetensors"), device="cpu", config=str(flux_folder))
    expected = Denoiser.load(str(flux_folder), device="cpu")
    assert found.fingerprint() == expected.fingerprint()
    assert found.model.fingerprint() == expected.model.fingerprint()


def test_train_and_detect_take_it_as_it_is_typed(files, tmp_path):
    schema.register()
    file = [f"model.config={files / 'sd'}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        words = spelled("train", ["data.shards=x", f"model.pretrained={files / 'sd.safetensors'}", *file])
        assert instantiate(compose("train", words).model).unet.training
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("fox\n")
    main(["detect", f"model={files / 'sd.safetensors'}", *file, f"prompts={prompts}", "num_images_per_prompt=1",
          "num_inference_steps=2", "device=cpu", f"out={tmp_path}/detect"])  # fmt: skip
    assert (tmp_path / "detect" / "scores.parquet").is_file()


def made(path: Path, **shapes) -> str:
    save_file({name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}, path)
    return str(path)


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (dict(model__diffusion_model__input_blocks__0__0__weight=(2, 9, 1, 1)),
         "is a model of the kind inpainting; model.pretrained takes"),
        (dict(conditioner__embedders__1__model__transformer__resblocks__9__mlp__c_proj__bias=(2,)),
         "is a StableDiffusionXLPipeline; say model=stable_diffusion_xl"),
        (dict(double_blocks__0__img_attn__norm__key_norm__scale=(2,)), "is a FluxPipeline; say model=flux"),
        (dict(weight=(2,)), "its tensors do not tell what it is; say model.config=FOLDER"),
        (dict(unet__x__lora_A__weight=(2, 2)), "is an adapter, not a model; name its base there, and say lora="),
    ],
)  # fmt: skip
def test_a_file_that_will_not_do_is_named_in_one_line(tmp_path, shapes, says):
    with pytest.raises(ValueError, match=says) as raised:
        from_pretrained(made(tmp_path / "x.safetensors", **shapes), "stable_diffusion", *PLAIN)
    assert "\n" not in str(raised.value)


def test_a_file_needs_a_config_where_there_is_no_hub(files):
    """Of a real one the tensors tell what it is, and so where its configs would be."""
    key = "model.diffusion_model.output_blocks.11.0.skip_connection.weight".replace(".", "__")
    file = made(files / "v1.safetensors", **{key: (2,)})
    with pytest.raises(
        ValueError, match=r"configs of stable-diffusion-v1-5/stable-diffusion-v1-5 could not be had; say"
    ) as raised:
        load_pipeline(file, AUDITED, torch.float32, key="model")
    assert "\n" not in str(raised.value)


def test_what_is_in_neither_is_named(files):
    with pytest.raises(ValueError, match=r"flux.safetensors cannot be loaded: .*; say model.config=FOLDER"):
        load_pipeline(str(files / "flux.safetensors"), AUDITED, torch.float32, key="model", config=str(files / "flux"))


@pytest.mark.parametrize(
    ("source", "config", "says"),
    [
        (
            "none.safetensors",
            None,
            "no such file; model.pretrained takes a diffusers folder, a hub id or a .safetensors",
        ),
        ("sd.ckpt", None, "is no .safetensors file, and others may run code when they are read; convert it"),
        ("text.safetensors", None, "cannot be read as .safetensors; fetch it again"),
        ("sd.safetensors", "none/at/all", "model.config=none/at/all: no such folder; model.config takes a diffusers"),
        ("sd.safetensors", "flux", "is a FluxPipeline; say model=flux"),
        ("sd", "sd", "describes a .safetensors file, and model.pretrained=.* is none; leave it out"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_loaded(files, source, config, says):
    (files / "sd.ckpt").write_bytes(b"pickle")
    (files / "text.safetensors").write_bytes(b"not a header")
    config = str(files / config) if config and (files / config).exists() else config
    with pytest.raises(ValueError, match=says):
        check_pipeline("model.pretrained", str(files / source), trained("stable_diffusion"), config)
