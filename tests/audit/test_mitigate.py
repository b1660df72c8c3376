import csv
import json
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from memtrain.audit.batches import ShrinkingBatches
from memtrain.audit.denoiser import generation_seeds
from memtrain.audit.mitigate.comparison import Comparison, Judges, caption_margin
from memtrain.audit.mitigate.methods import (
    Embedding,
    InitialNoise,
    LateGuidance,
    RandomNumbers,
    RandomTokens,
    RepeatWords,
    Start,
)
from memtrain.audit.mitigate.mitigation import Sampling, follow, generate, mitigate, resolve_target
from memtrain.audit.pictures import encode_images
from memtrain.cli.main import main
from memtrain.core.copies import latent_rmse
from memtrain.data.samples import ShardSamples
from memtrain.models.samplers import Predictions

PROMPT = "fox on a red background"
FEW = dict(num_images_per_prompt=2, num_inference_steps=4)


@pytest.fixture(scope="module")
def plain(denoiser) -> torch.Tensor:
    """(R,) scores of the prompt as it is."""
    return mitigate(denoiser, PROMPT, method=RepeatWords(), **FEW).scores_before


@pytest.mark.parametrize("method", [Embedding(iterations=6), InitialNoise(iterations=6)])
@pytest.mark.parametrize("share", [0.9, 0.0])
def test_each_generation_reaches_the_target_or_takes_all_iterations(denoiser, plain, method, share):
    target = share * plain.min().item()
    found = mitigate(denoiser, PROMPT, target, method=method, **FEW)
    torch.testing.assert_close(found.scores_before, plain)
    reached = found.scores_after <= target + 1e-4
    assert (reached | (found.iterations == 6)).all() and (found.iterations > 0).all()
    assert share > 0 or (found.iterations == 6).all()
    assert (found.scores_after < found.scores_before).all()


def test_a_target_that_is_met_changes_nothing(denoiser, plain):
    found = mitigate(denoiser, PROMPT, plain.max().item() + 1, **FEW)
    assert found.iterations.eq(0).all()
    torch.testing.assert_close(found.prompt_embeds, found.before.prompt_embeds, rtol=0, atol=0)
    assert np.array_equal(found.images_before, found.images_after)


def test_only_bos_stays_where_it_is(denoiser):
    found = mitigate(denoiser, PROMPT, 0.0, method=Embedding(lr=0.5, iterations=3), **FEW)
    before, after = found.before.prompt_embeds, found.prompt_embeds
    torch.testing.assert_close(after[:, 0], before[:, 0], rtol=0, atol=0)
    assert (after[:, 1:] != before[:, 1:]).flatten(1).any(dim=1).all()
    assert all(weight.grad is None for weight in denoiser.model.unet.parameters())


def test_a_finished_generation_is_not_moved_by_the_others(denoiser, plain):
    target = plain.mean().item()  # one is below, one above
    found = mitigate(denoiser, PROMPT, target, **FEW)
    done = plain <= target
    assert done.any() and not done.all()
    assert found.iterations[done].eq(0).all() and (found.iterations[~done] > 0).all()
    torch.testing.assert_close(found.prompt_embeds[done], found.before.prompt_embeds[done], rtol=0, atol=0)


def test_the_optimised_noise_keeps_its_norm(denoiser):
    found = mitigate(denoiser, PROMPT, 0.0, method=InitialNoise(iterations=3), **FEW)
    before, after = found.before.start, found.after.start
    torch.testing.assert_close(after.flatten(1).norm(dim=1), before.flatten(1).norm(dim=1))
    assert not torch.equal(after, before)


def test_embeddings_and_noise_draw_the_same_pictures_with_the_stock_pipeline(denoiser, pipeline):
    found = mitigate(denoiser, PROMPT, 0.0, method=Embedding(iterations=2), **FEW)
    kept = pipeline.scheduler
    pipeline.scheduler = DDIMScheduler.from_config(kept.config, clip_sample=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        latents = pipeline(
            prompt_embeds=found.prompt_embeds,
            negative_prompt_embeds=denoiser.model.null(2).hidden,
            latents=found.after.start,
            num_inference_steps=4,
            guidance_scale=7.5,
            output_type="latent",
        ).images
    pipeline.scheduler = kept
    assert found.prompt_embeds.dtype == pipeline.unet.dtype
    torch.testing.assert_close(latents, found.after.latents, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [RandomTokens(3), RandomNumbers(3), RepeatWords(3)])
def test_words_are_put_in_and_the_prompt_keeps_its_own(denoiser, method):
    found, again = (mitigate(denoiser, PROMPT, method=method, **FEW) for _ in range(2))
    assert found.after.prompts == again.after.prompts  # a function of the seed
    assert found.after.prompts[0] != found.after.prompts[1]  # each generation its own
    for prompt in found.after.prompts:
        words = iter(prompt.split())
        assert len(prompt.split()) == 5 + 3 and all(word in words for word in PROMPT.split())  # in order
    other = mitigate(denoiser, PROMPT, method=method, seed=1, **FEW)
    assert other.after.prompts != found.after.prompts


@pytest.mark.parametrize(
    "method", [Embedding(), InitialNoise(), RandomTokens(), RandomNumbers(), RepeatWords(), LateGuidance()]
)
def test_the_empty_prompt_stays_as_it_is(denoiser, method):
    found = mitigate(denoiser, "", 0.1, method=method, **FEW)
    assert found.scores_after.abs().max() < 1e-4 and found.after.prompts == ["", ""]
    assert found.after.latents.isfinite().all() and found.iterations.eq(0).all()


def test_late_guidance_is_unconditional_until_the_first_local_minimum(denoiser):
    steps, seeds = 12, generation_seeds(PROMPT, 3, 0)
    found = generate(denoiser, [PROMPT] * 3, seeds, Sampling(steps), ShrinkingBatches(8), LateGuidance())
    for row, scores in enumerate(found.scores.tolist()):
        minima = [n for n in range(2, steps) if scores[n - 2] > scores[n - 1] < scores[n]]
        assert found.guided_from[row] == (minima[0] if minima else steps)
    null, latents = denoiser.model.null(3), denoiser.noise(seeds)  # plainly written
    cond = denoiser.encode([PROMPT] * 3)
    with torch.no_grad():
        timesteps = denoiser.model.sampler.timesteps(steps)
        for number, t in enumerate(timesteps):
            pair = denoiser.predict_pair(latents, t, cond, null)
            noise_cond, noise_null = pair.noise_cond, pair.noise_null
            guided = noise_null + 7.5 * (noise_cond - noise_null)
            chosen = [guided[r] if number >= found.guided_from[r] else noise_null[r] for r in range(3)]
            chosen = torch.stack(chosen)
            taken = Predictions(chosen, chosen, chosen, chosen)
            latents = denoiser.model.sampler.step(latents, timesteps, number, taken, 1.0)
    torch.testing.assert_close(found.latents, latents, rtol=1e-4, atol=1e-4)


def test_late_guidance_finds_the_minimum_of_each_row(denoiser, monkeypatch):
    falling = iter([[3.0, 3.0, 1.0], [2.0, 4.0, 2.0], [2.5, 5.0, 3.0], [1.0, 6.0, 4.0]])  # a step each
    monkeypatch.setattr(Predictions, "magnitude", property(lambda _: torch.tensor(next(falling))))
    start = Start.of(denoiser, [PROMPT] * 3, [1, 2, 3])
    assert follow(denoiser, start, Sampling(4), holds_guidance=True).guided_from.tolist() == [2, 4, 4]


def test_same_for_a_seed_and_any_batch_size(denoiser, plain):
    target = 0.9 * plain.min().item()
    one, many = (mitigate(denoiser, PROMPT, target, batch_size=b, **FEW) for b in (1, 2))
    torch.testing.assert_close(one.scores_before, many.scores_before, rtol=0, atol=1e-5)
    torch.testing.assert_close(one.iterations, many.iterations)
    again = mitigate(denoiser, PROMPT, target, batch_size=2, **FEW)
    assert torch.equal(again.after.latents, many.after.latents)


def test_target_is_a_score_or_a_quantile_of_reference_prompts(denoiser):
    sampling, batches = Sampling(4), ShrinkingBatches(8)
    texts = ["cat", "dog on a white background"]
    scores = torch.cat([mitigate(denoiser, text, method=RepeatWords(), **FEW).scores_before for text in texts])
    found = resolve_target(denoiser, "q0.5", texts, 2, 0, sampling, batches)
    assert found == pytest.approx(scores.double().quantile(0.5).item(), rel=1e-4)
    assert resolve_target(denoiser, "1.5", None, 2, 0, sampling, batches) == 1.5
    highest = resolve_target(denoiser, "q1", texts, 2, 0, sampling, batches)
    assert highest == pytest.approx(scores.max().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(), "needs target="),
        (dict(target="q0.9"), "say reference=FILE"),
        (dict(target="q1.5"), "q0 to q1"),
        (dict(target=float("nan")), "must be a score >= 0"),
        (dict(target=1, num_images_per_prompt=0), "num_images_per_prompt must be >= 1"),
        (dict(target=1, num_inference_steps=0), "num_inference_steps must be >= 1"),
    ],
)
def test_errors_say_what_is_wrong_in_one_line(denoiser, options, message):
    with pytest.raises(ValueError, match=message) as error:
        mitigate(denoiser, PROMPT, **options)
    assert "\n" not in str(error.value)


def test_methods_check_their_settings():
    for wrong in (lambda: Embedding(lr=0), lambda: InitialNoise(iterations=0), lambda: RandomTokens(0)):
        with pytest.raises(ValueError, match="of a mitigation must be"):
            wrong()


def test_training_images_are_copies_of_themselves(denoiser, corpus):
    images = np.stack([ShardSamples(str(corpus), 64).get(n)[0] for n in range(2)]).transpose(0, 2, 3, 1)
    latents = encode_images(denoiser, images, ShrinkingBatches(1))
    assert latents.shape == (2, *denoiser.latent_shape)
    assert latent_rmse(latents, latents).eq(0).all() and (latent_rmse(latents, latents.flip(0)) > 0).all()
    judges = Judges(originals=images, judge=denoiser, max_rmse=1e9)
    comparison = Comparison(denoiser, ["cat", "fox"], 2, Sampling(2), judges)
    result = comparison.run("none", None, None)
    assert result.outcome.copy_rate == 1 and result.images.shape == (4, 64, 64, 3)
    # what reference prompts reach by chance is no copy
    by_chance = generate(denoiser, ["dog"] * 2, generation_seeds("dog", 2, 0), Sampling(2), ShrinkingBatches(2))
    comparison.set_cut(["dog"], [latents])
    least = min(latent_rmse(by_chance.latents, latents[n : n + 1]).min().item() for n in range(2))
    assert least - 1e-4 < comparison.cut.distance < least
    margin = caption_margin(denoiser, images, ["", ""], [1, 2], ShrinkingBatches(2))
    assert margin.abs().max() < 1e-5  # the empty caption explains nothing


def test_command_prints_a_table_of_all_methods(pipeline_folder, corpus, tmp_path, capsys):
    samples = ShardSamples(str(corpus), 64)
    with (tmp_path / "canaries.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["key", "caption", "group"])
        rows.writerow([samples.key(0), "<b>fox</b> $x", "canary"])
        rows.writerow([samples.key(1), "cat", "reference"])
    out = tmp_path / "out"
    arguments = f"model={pipeline_folder} prompts={tmp_path / 'canaries.csv'} prompts.label=group out={out}"
    methods = "method=all method.embedding.iterations=1 method.initial_noise.iterations=1 target=q0.1"
    judged = f"data={corpus} judge={pipeline_folder} num_images_per_prompt=2 num_inference_steps=2"
    main(["mitigate", *arguments.split(), *methods.split(), *judged.split()])
    printed = capsys.readouterr().out
    words = ["random_tokens", "random_numbers", "repeat_words"]
    methods = ["none", "embedding", *words, "late_guidance", "initial_noise"]
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == methods
    assert "copy rate" in printed and "caption margin" in printed
    written = json.loads((out / "mitigate.json").read_text(encoding="utf-8"))
    assert written["cut"] <= 0.5 and "of 2 generations from never-trained captions" in written["cut_is"]
    assert written["prompts"] == ["<b>fox</b> $x"] and len(written["methods"]) == 7
    for name in methods[1:]:
        assert (out / f"{name}.png").is_file() and (out / f"{name}.safetensors").is_file()


def test_without_a_method_there_is_what_is_drawn_without(pipeline_folder, tmp_path, capsys):
    words = ["prompt=cat", "num_images_per_prompt=1", "num_inference_steps=2", f"out={tmp_path / 'out'}"]
    main(["mitigate", f"model={pipeline_folder}", "method=none", *words])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["none"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prompt=cat", "method=magic"], "method must be one of embedding"),
        (["prompt=cat", "method=[none,embedding]"], "all or none, got none"),
        (["prompt=cat"], "needs target="),
        (["prompt=cat", "target=q0.5"], "say reference=FILE"),
        (["prompt=cat", "target=1", "data=shards"], "column key"),
        ([], "one of the two"),
        (["prompt=cat", "target=1", "cut_prompts=-1"], "cut_prompts must be >= 0, got -1"),
        (["prompt=cat", "target=1", "nearest=0"], "nearest must be >= 1, got 0"),
    ],
)
def test_command_errors_are_one_line(pipeline_folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").touch()
    with pytest.raises(SystemExit):
        main(["mitigate", f"model={pipeline_folder}", f"out={tmp_path / 'out'}", *arguments])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_xl_keeps_its_pooled_embedding(xl_pipeline):
    found = mitigate(xl_pipeline, PROMPT, 0.0, method=Embedding(iterations=2), **FEW)
    assert (found.scores_after < found.scores_before).all()
    assert torch.equal(found.after.pooled_prompt_embeds, found.before.pooled_prompt_embeds)
    assert found.prompt_embeds.shape == found.before.prompt_embeds.shape
