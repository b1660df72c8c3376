"""What stands for padding in a T5's captions: the stock pipeline's own, or zeros."""

import numpy as np
import pytest
import torch

from memtrain import detect
from memtrain.audit.denoiser import AsTrained, Denoiser
from memtrain.models.t5 import pad_with_zeros, set_t5_padding
from tests.support.families import flux, stable_diffusion, stable_diffusion_3
from tests.support.flows import few_tokens  # noqa: F401

CAPTIONS = ["fox on a teal background", "", "camel " * 600]
MAKE = {"3": lambda base: stable_diffusion_3(base, t5=True), "flux": flux}
pytestmark = pytest.mark.usefixtures("few_tokens")

FEW = dict(num_images_per_prompt=1, num_inference_steps=3)


@pytest.fixture(params=MAKE)
def pipeline(request, pipeline_folder):
    return MAKE[request.param](stable_diffusion(pipeline_folder))


def t5_of(pipeline):
    encoder = getattr(pipeline, "text_encoder_3", None)
    return (pipeline.text_encoder_2, pipeline.tokenizer_2) if encoder is None else (encoder, pipeline.tokenizer_3)


def test_a_caption_is_encoded_as_without_padding_and_followed_by_zeros(pipeline):
    model = Denoiser.of(pipeline).model
    encoder, tokenizer = t5_of(pipeline)
    width = encoder.config.d_model
    alone = [encoder(tokenizer([caption], return_tensors="pt").input_ids)[0][0] for caption in CAPTIONS[:2]]
    stock, pooled = model.encode(CAPTIONS).hidden, model.encode(CAPTIONS).pooled
    set_t5_padding(model, "zero")
    told = model.encode(CAPTIONS)
    assert told.hidden.shape == stock.shape and torch.equal(told.pooled, pooled)
    count = stock.shape[1] - (pipeline.tokenizer.model_max_length if encoder is not model.text_encoders[1] else 0)
    for row, own in zip(told.hidden[:2, -count:], alone, strict=True):
        torch.testing.assert_close(row[: len(own), :width], own)
        assert not row[len(own) :].any()
    torch.testing.assert_close(told.hidden[2], stock[2])  # as long as there is room: nothing is padded
    assert not torch.allclose(told.hidden[:2], stock[:2], atol=1e-3)


def test_audits_and_the_stock_pipeline_with_such_an_encoder_see_the_same(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    plain, zero = (
        Denoiser.load(str(tmp_path), "cpu", as_trained=AsTrained(t5_padding=padding)) for padding in ("encoded", "zero")
    )
    assert plain.fingerprint() != zero.fingerprint()
    scores = [detect(denoiser, CAPTIONS[0], **FEW).steps["magnitude"] for denoiser in (plain, zero)]
    pad_with_zeros(t5_of(pipeline)[0])
    found = detect(pipeline, CAPTIONS[0], **FEW).steps["magnitude"]
    np.testing.assert_allclose(found, scores[1], rtol=1e-5)
    assert not np.allclose(found, scores[0], rtol=1e-3)


def test_what_has_no_t5_is_refused_in_a_line(pipeline, pipeline_folder):
    model = Denoiser.of(pipeline).model
    with pytest.raises(ValueError, match="t5_padding must be one of encoded, zero, got zeros"):
        set_t5_padding(model, "zeros")
    for base in (stable_diffusion(pipeline_folder), stable_diffusion_3(stable_diffusion(pipeline_folder))):
        without = Denoiser.of(base).model
        set_t5_padding(without, "encoded")
        with pytest.raises(ValueError, match="t5_padding=zero is for a model with a T5, which this StableDiffusion"):
            set_t5_padding(without, "zero")
