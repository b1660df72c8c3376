import json
import re

import pytest
import torch

from memtrain.audit.denoiser import Denoiser, generation_seeds
from memtrain.audit.explain.explanation import check_words, explain, token_gradients
from memtrain.audit.explain.words import words_of
from memtrain.audit.scored_path import ScoredPath
from memtrain.cli.arguments import spelled
from memtrain.cli.main import main
from memtrain.report.tokens import draw_significance, write_page
from tests.support.families import assert_unchanged, state_of

PROMPT = "fox on a red background"
FEW = dict(num_inference_steps=4, steps=(0, 1))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_token_significance_equals_a_finite_difference(pipelines, prediction_type):
    """Along the gradient's own direction, d changes by the gradient's norm."""
    denoiser = Denoiser.load(str(pipelines[prediction_type]), device="cpu")
    denoiser.model.unet.double()
    denoiser.model.text_encoder.double()
    denoiser.dtype = torch.float64
    embeds = denoiser.model.token_embeds([PROMPT]).double()
    latents, t = denoiser.noise([1]), denoiser.model.sampler.timesteps(4)[0]

    def score(embeds):
        told = denoiser.model.encode_embeds(embeds, [PROMPT])
        return denoiser.predict_pair(latents, t, told, denoiser.model.null(1)).magnitude.sum()

    norms, scores = token_gradients(denoiser, [PROMPT], [1], ScoredPath((0,), 4, 7.5))
    (gradient,) = torch.autograd.grad(score(embeds.requires_grad_(True)), embeds)
    assert scores.item() == pytest.approx(score(embeds).item(), rel=1e-4)
    for token in words_of(PROMPT, denoiser.model.caption_pieces(PROMPT))[0].tokens:
        direction = torch.zeros_like(embeds)
        direction[:, token] = gradient[:, token] / gradient[:, token].norm()
        step = 0.02 / gradient[:, token].norm()  # d moves by about 0.04, far above rounding
        with torch.no_grad():
            slope = (score(embeds + step * direction) - score(embeds - step * direction)) / (2 * step)
        assert norms[0, 0, token].item() == pytest.approx(slope.item(), rel=0.05)


def test_pieces_are_joined_and_start_end_and_padding_left_out(denoiser):
    explanation = explain(denoiser, PROMPT, num_images_per_prompt=2, **FEW)
    assert [word.text for word in explanation.words] == PROMPT.split()
    assert all(PROMPT[word.start : word.end] == word.text for word in explanation.words)
    ids = denoiser.model.tokenize([PROMPT])[0]
    shown = [token.position for token in explanation.tokens]
    ends = (denoiser.model.tokenizer.bos_token_id, denoiser.model.tokenizer.eos_token_id)
    assert shown == [place for place, token in enumerate(ids.tolist()) if token not in ends]
    own = {token.position: token.significance for token in explanation.tokens}
    for word, found in zip(words_of(PROMPT, denoiser.model.caption_pieces(PROMPT)), explanation.words, strict=True):
        parts = [own[place] for place in word.tokens]
        assert max(parts) * 0.999 <= found.significance <= sum(parts) * 1.001  # a norm over the pieces


def test_words_of_odd_prompts(denoiser):
    def words_in(prompt):
        return words_of(prompt, denoiser.model.caption_pieces(prompt))

    assert words_in("") == words_in("   ") == []
    odd = words_in("don't-stop, 狐 café!")
    assert [word.text for word in odd] == ["don't-stop", ",", "狐", "café", "!"]
    long = words_in("fox " * 60)
    assert len(long) == 60 and long[0].tokens and not long[-1].tokens  # beyond what the text encoder reads
    assert explain(denoiser, "fox " * 60, num_images_per_prompt=1, **FEW).words[-1].significance is None


def test_same_for_a_seed_and_any_batch_size_and_nothing_changes_in_the_pipeline(denoiser, pipeline):
    before = state_of(pipeline)
    one, many = (explain(pipeline, [PROMPT], num_images_per_prompt=3, batch_size=b, **FEW)[0] for b in (1, 3))
    assert one.score == pytest.approx(many.score, abs=1e-5)
    for a, b in zip(one.words, many.words, strict=True):
        assert a.significance == pytest.approx(b.significance, rel=1e-3)
    assert explain(denoiser, PROMPT, num_images_per_prompt=3, seed=1, **FEW).score != one.score
    assert_unchanged(pipeline, before)


def test_later_steps_lie_on_the_path_guided_towards_the_prompt(denoiser):
    seeds = generation_seeds(PROMPT, 1, 0)
    _, scores = token_gradients(denoiser, [PROMPT], seeds, ScoredPath((2,), 4, 7.5))
    cond, null, latents = denoiser.encode([PROMPT]), denoiser.model.null(1), denoiser.noise(seeds)
    with torch.no_grad():
        sampler = denoiser.model.sampler
        timesteps = sampler.timesteps(4)
        for index in range(2):
            predicted = denoiser.predict_pair(latents, timesteps[index], cond, null)
            latents = sampler.step(latents, timesteps, index, predicted, 7.5)
        magnitude = denoiser.predict_pair(latents, timesteps[2], cond, null).magnitude
    torch.testing.assert_close(scores[0], magnitude, rtol=1e-4, atol=1e-4)


def test_the_empty_prompt_scores_nothing_and_has_no_words(denoiser, tmp_path):
    explanation = explain(denoiser, "", num_images_per_prompt=2, suggest=2, **FEW)
    assert explanation.score == pytest.approx(0, abs=1e-4)
    assert explanation.words == explanation.tokens == explanation.edits == []
    assert check_words(denoiser, [explanation], num_images_per_prompt=1, **FEW) == []
    write_page(tmp_path / "page.html", [explanation], "t")
    draw_significance(tmp_path / "bars.png", explanation)
    assert "(the empty prompt)" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_suggestions_drop_and_replace_the_top_words(denoiser):
    explanation = explain(denoiser, PROMPT, num_images_per_prompt=1, suggest=2, **FEW)
    top = [word.text for word in explanation.ranked()[:2]]
    assert {edit.word for edit in explanation.edits} == set(top)
    dropped = [edit for edit in explanation.edits if edit.replacement is None]
    assert len(dropped) == 2 and all(edit.word not in edit.prompt.split() for edit in dropped)
    assert all(edit.replacement in edit.prompt for edit in explanation.edits if edit.replacement)
    assert [edit.score for edit in explanation.edits] == sorted(edit.score for edit in explanation.edits)


def test_check_drops_both_ends_of_the_ranking(denoiser):
    explanation = explain(denoiser, PROMPT, num_images_per_prompt=2, **FEW)
    (check,) = check_words(denoiser, [explanation], num_images_per_prompt=2, **FEW)
    assert (check.top, check.bottom) == (explanation.ranked()[0].text, explanation.ranked()[-1].text)
    without = explain(denoiser, PROMPT.replace(f"{check.top} ", "", 1), num_images_per_prompt=1, **FEW)
    assert check.score_without_top != pytest.approx(check.score, abs=1e-6) and without.score > 0


def test_the_check_draws_noise_that_ranked_nothing(denoiser, monkeypatch):
    drawn = []
    noise = Denoiser.noise
    monkeypatch.setattr(Denoiser, "noise", lambda self, seeds: drawn.append(set(seeds)) or noise(self, seeds))
    explanation = explain(denoiser, PROMPT, num_images_per_prompt=3, suggest=1, **FEW)
    ranked, drawn[:] = set.union(*drawn), []
    (check,) = check_words(denoiser, [explanation], num_images_per_prompt=3, **FEW)
    checked = set.union(*drawn)
    assert len(ranked) == len(checked) == 3 and ranked.isdisjoint(checked)
    assert check.score != pytest.approx(explanation.score, abs=1e-6)
    assert check_words(denoiser, [explanation], num_images_per_prompt=3, **FEW) == [check]


def test_markup_in_a_prompt_shows_as_text(denoiser, tmp_path):
    prompt = 'fox <script>alert(1)</script> & "b" $x_1$'
    explanation = explain(denoiser, prompt, num_images_per_prompt=1, suggest=1, **FEW)
    write_page(tmp_path / "page.html", [explanation], "<b>title</b>")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<b>" not in page and "&lt;" in page and "script" in page
    assert not re.search(r"(src|href)=|@import|url\(", page)  # self-contained
    assert "prefers-color-scheme" in page and "width=device-width" in page
    draw_significance(tmp_path / "bars.png", explanation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_images_per_prompt=0), "num_images_per_prompt must be >= 1"),
        (dict(steps=(4,), num_inference_steps=4), r"0 to 3, .*got \[4\]"),
        (dict(steps=()), "steps must be"),
        (dict(batch_size=0), "batch_size must be >= 1"),
        (dict(suggest=-1), "suggest must be >= 0"),
    ],
)
def test_errors_say_what_is_wrong_in_one_line(denoiser, options, message):
    with pytest.raises(ValueError, match=message) as error:
        explain(denoiser, PROMPT, **options)
    assert "\n" not in str(error.value)


def test_any_prompt_survives_the_command_line():
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    texts = ("a, (b) [c]", "it's", "\\", "\\'", "${x}", 'say "hi"', "", "null", "[x]", "a=b: {c}", "<script>")
    for text in texts:
        (argument,) = spelled("explain", [f"prompt={text}"])
        value = OverridesParser.create().parse_override(argument).value()
        assert str(OmegaConf.create({"prompt": str(value)}).prompt) == text


def test_command_writes_page_charts_and_json(pipeline_folder, tmp_path, capsys):
    rows = "caption,group\nfox on a red background,canary\ncat,reference\n"
    (tmp_path / "p.csv").write_text(rows, encoding="utf-8")
    out = tmp_path / "out"
    arguments = f"model={pipeline_folder} prompts={tmp_path / 'p.csv'} prompts.label=group check=true out={out}"
    main(["explain", *arguments.split(), "steps=[0]", "num_inference_steps=2", "num_images_per_prompt=1"])
    assert re.search(r"\d of 1", capsys.readouterr().out)
    written = json.loads((out / "explain.json").read_text(encoding="utf-8"))
    assert [one["prompt"] for one in written["prompts"]] == ["fox on a red background"]  # not the reference
    assert (out / "explain.html").is_file() and (out / "000.png").is_file()


def test_command_without_a_prompt_says_so(pipeline_folder, capsys):
    with pytest.raises(SystemExit):
        main(["explain", f"model={pipeline_folder}"])
    assert capsys.readouterr().err.count("\n") == 1


def test_both_text_encoders_of_xl_are_heard(xl_pipeline):
    explanation = explain(xl_pipeline, PROMPT, num_images_per_prompt=2, **FEW)
    assert [word.text for word in explanation.words] == PROMPT.split()
    assert all(word.significance > 0 for word in explanation.words)
