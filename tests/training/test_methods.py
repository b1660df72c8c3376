"""Caption and embedding baselines: what they change, how often, and that it does not depend on ranks."""

from collections import Counter

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from memtrain.cli import schema
from memtrain.cli.main import config_folder
from memtrain.core.streams import Stream, place_seed
from memtrain.models.pretrained import from_pretrained
from memtrain.models.words import vocabulary
from memtrain.training.methods import (
    EmbeddingNoise,
    Method,
    RandomCaption,
    RandomTokensAdded,
    RandomTokensReplaced,
    SeveralCaptions,
    WordsRepeated,
)
from tests.conftest import build_data, build_module, fit, weights

REWRITING = (RandomTokensAdded, RandomTokensReplaced, WordsRepeated, RandomCaption)
CAPTION = "a red fox on a teal background with snow"


@pytest.fixture(scope="module")
def model(pipeline_folder):
    options = dict(train_text_encoder=False, gradient_checkpointing=False, channels_last=False, compile=False)
    return from_pretrained(str(pipeline_folder), "auto", **options)


def generators(count, step=0):
    return [np.random.default_rng(place_seed(7, Stream.METHOD, step, place)) for place in range(count)]


def rewritten(method, captions, model, step=0):
    return method.captions(captions, generators(len(captions), step), model)


def contents(caption, model):
    """The tokens that the model sees, without start and end."""
    tokenizer = model.tokenizer
    seen = model.tokenize([caption])[0].tolist()
    return [token for token in seen if token not in tokenizer.all_special_ids]


@pytest.mark.parametrize("method", REWRITING)
def test_a_share_of_the_captions_is_rewritten_and_empty_ones_stay_empty(method, model):
    found = rewritten(method(probability=0.25, count=2), [CAPTION, "", "  "] * 1000, model)
    share = np.mean([caption != CAPTION for caption in found[::3]])
    assert share == pytest.approx(0.25, abs=0.05)
    assert found[1::3] == [""] * 1000 and found[2::3] == ["  "] * 1000


@pytest.mark.parametrize("method", REWRITING)
def test_a_caption_depends_on_seed_step_and_place_alone(method, model):
    method = method(probability=1.0, count=2)
    captions = [f"{CAPTION} {number}" for number in range(8)]
    whole = rewritten(method, captions, model)
    halves = [method.captions(captions[rows], generators(8)[rows], model) for rows in (slice(0, 4), slice(4, 8))]
    assert halves[0] + halves[1] == whole == rewritten(method, captions, model)
    assert rewritten(method, captions, model, step=1) != whole
    assert len(set(rewritten(method, [CAPTION] * 8, model))) > 4  # rows differ among themselves


def test_added_tokens_leave_the_words_in_order_and_reach_every_gap(model):
    words, places = CAPTION.split(), Counter()
    known = set(vocabulary(model.tokenizer))
    for caption in rewritten(RandomTokensAdded(1.0, 1), [CAPTION] * 400, model):
        found = caption.split(" ")
        gap = next((n for n, (old, new) in enumerate(zip(words, found)) if old != new), len(words))  # noqa: B905
        assert found[:gap] + found[gap + 1 :] == words and found[gap] in known
        places[gap] += 1
    assert set(places) == set(range(len(words) + 1))


def test_replacement_keeps_the_number_of_words_and_changes_at_most_count(model):
    words = CAPTION.split()
    changed = Counter()
    for caption in rewritten(RandomTokensReplaced(1.0, 3), [CAPTION] * 200, model):
        found = caption.split(" ")
        assert len(found) == len(words)
        changed.update(n for n, (old, new) in enumerate(zip(words, found, strict=True)) if old != new)
        assert sum(old != new for old, new in zip(words, found, strict=True)) <= 3
    assert set(changed) == set(range(len(words)))
    assert len(rewritten(RandomTokensReplaced(1.0, 5), ["fox"], model)[0].split(" ")) == 1


def test_repeated_words_are_the_captions_own(model):
    before = Counter(CAPTION.split())
    for caption in rewritten(WordsRepeated(1.0, 2), [CAPTION] * 100, model):
        more = Counter(caption.split())
        assert more.total() == before.total() + 2 and set(more) == set(before) and not before - more


def test_a_random_caption_has_nothing_of_the_old_one(model):
    found = rewritten(RandomCaption(1.0, 4), [CAPTION] * 50, model)
    known = set(vocabulary(model.tokenizer))
    assert all(len(caption.split(" ")) == 4 and set(caption.split(" ")) <= known for caption in found)
    assert len(set(found)) == 50


def test_random_words_are_readable_and_hold_no_special_token(model):
    special = set(model.tokenizer.all_special_ids)
    words = vocabulary(model.tokenizer)
    assert len(words) > 1000 and all(word.strip() == word != "" and "\ufffd" not in word for word in words)
    assert not any(set(ids) & special for ids in model.tokenizer(words, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("method", [RandomTokensAdded, RandomTokensReplaced, WordsRepeated])
@pytest.mark.parametrize("caption", [" ".join([CAPTION] * 20), "x" * 400, "x" * 400 + " fox"])
def test_what_is_put_in_lies_inside_the_window_of_a_long_caption(method, caption, model):
    before = contents(caption, model)
    for found in rewritten(method(1.0, 2), [caption] * 60, model):
        after = contents(found, model)
        assert len(before) == 22 and (len(after) == 22 or method is RandomTokensReplaced)
        # where one word fills the window, so does its repetition
        assert after != before or (method is WordsRepeated and caption[0] == "x")


def test_noise_has_its_deviation_and_spares_rows_without_a_caption(model):
    hidden = model.encode(["fox", "", "bear"]).hidden
    captioned = torch.tensor([True, False, True])
    noisy = EmbeddingNoise(0.1).embeddings(hidden, captioned, generators(3))
    assert torch.equal(noisy[1], hidden[1])
    assert (noisy - hidden)[[0, 2]].std() == pytest.approx(0.1, rel=0.05)
    assert abs((noisy - hidden)[[0, 2]].mean()) < 0.005
    last = EmbeddingNoise(0.1).embeddings(hidden[2:], captioned[2:], generators(3)[2:])
    assert torch.equal(last[0], noisy[2])
    half = EmbeddingNoise(0.1).embeddings(hidden.bfloat16(), captioned, generators(3))
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: EmbeddingNoise(0.0), r"method\.std must be > 0, got 0; use method=none"),
        (lambda: WordsRepeated(0.0, 2), r"method\.probability must be in \(0, 1\], got 0"),
        (lambda: RandomCaption(1.5, 2), r"method\.probability must be in \(0, 1\], got 1\.5"),
        (lambda: RandomCaption(float("nan"), 2), r"method\.probability"),
        (lambda: RandomTokensAdded(0.1, 0), r"method\.count must be >= 1, got 0"),
    ],
)
def test_wrong_values_are_named(build, says):
    with pytest.raises(ValueError, match=says):
        build()


def test_every_choice_is_a_method():
    schema.register()
    found = {}
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        for path in sorted((config_folder() / "method").glob("*.yaml")):
            cfg = compose("train", [f"method={path.stem}"])
            found[path.stem] = instantiate(cfg.method)
            assert isinstance(found[path.stem], Method)
            assert cfg.data.caption == ("all_captions" if path.stem == "several_captions" else "txt")
    assert {type(method) for method in found.values()} == {Method, SeveralCaptions, EmbeddingNoise, *REWRITING}


@pytest.mark.parametrize("method", [EmbeddingNoise(0.1), RandomCaption(0.5, 4)])
def test_training_differs_from_training_without_and_repeats_itself(method, pipeline_folder, corpus, tmp_path):
    def trained(chosen):
        module = build_module(pipeline_folder, method=chosen)
        fit(module, build_data(corpus), tmp_path, 2)
        return weights(module)

    assert torch.equal(trained(method), trained(method))
    assert not torch.equal(trained(method), trained(Method()))


def train_a_rank(pipeline: str, corpus: str, out: str) -> None:
    module = build_module(pipeline, method=RandomTokensAdded(0.5, 2), reference_batch=4)
    trainer = fit(module, build_data(corpus, 2), out, 3, ranks=2)
    if trainer.is_global_zero:
        torch.save(weights(module), f"{out}/two.pt")


@pytest.mark.slow
def test_two_ranks_rewrite_as_one(forks, pipeline_folder, corpus, tmp_path):
    forks.call(train_a_rank, pipeline_folder, corpus, tmp_path, log=tmp_path / "log", ranks=2)
    module = build_module(pipeline_folder, method=RandomTokensAdded(0.5, 2), reference_batch=4)
    fit(module, build_data(corpus, 4), tmp_path, 3)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    torch.testing.assert_close(two, weights(module), atol=1e-6, rtol=0)
