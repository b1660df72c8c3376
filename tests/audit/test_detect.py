"""Detection: the same scores whatever the batch, the order, the stop or the parameterisation."""

import json
import logging

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf

from memtrain.audit.denoiser import Denoiser
from memtrain.audit.detect import scoring, spread
from memtrain.audit.detect.bench import measure_detection
from memtrain.audit.detect.density import EmbeddingDensity, TiledL2Density, tiled_distance
from memtrain.audit.detect.detection import SCORE_NAMES, detect, named_scores
from memtrain.audit.detect.scores import Magnitude, Sharpness
from memtrain.audit.detect.scoring import DetectionSettings, Plan
from memtrain.audit.detect.separation import by_group, by_step
from memtrain.cli.arguments import spelled
from memtrain.cli.detect import detect as command
from memtrain.cli.main import config_folder
from memtrain.report.detection import roc
from tests.audit.conftest import PROMPTS
from tests.support.families import flux, flux2_klein, stable_diffusion, stable_diffusion_3, stable_diffusion_xl

STEPWISE = SCORE_NAMES[:5]
SHORT = dict(num_images_per_prompt=2, num_scored_steps=2, num_inference_steps=4)


@pytest.fixture(scope="module")
def all_scores(denoiser):
    return detect(denoiser, PROMPTS, scores=STEPWISE, **SHORT)


def test_batch_sizes_1_and_16_agree(denoiser, all_scores):
    one = detect(denoiser, PROMPTS, scores=STEPWISE, batch_size=1, **SHORT)
    three = detect(denoiser, PROMPTS, scores=STEPWISE, batch_size=3, **SHORT)  # cuts a prompt's generations apart
    for name in STEPWISE:
        assert one.steps[name].shape == (3, 2, 2)
        np.testing.assert_allclose(one.steps[name], all_scores.steps[name], atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(three.steps[name], all_scores.steps[name], atol=1e-5, rtol=1e-5)


def test_a_score_depends_on_the_prompt_alone(denoiser, all_scores):
    other = detect(denoiser, [PROMPTS[2], PROMPTS[0]], scores=["magnitude"], **SHORT)
    expected = all_scores.steps["magnitude"][[2, 0]]
    np.testing.assert_allclose(other.steps["magnitude"], expected, atol=1e-5, rtol=1e-5)
    assert other.scores.shape == (2,)
    again = detect(denoiser, PROMPTS[:1], scores=["magnitude"], seed=1, **SHORT)
    assert abs(again.scores[0] - all_scores.of("magnitude")[0]) > 1e-4


def test_the_empty_prompt_scores_zero(denoiser, xl_pipeline):
    for own in (denoiser, xl_pipeline):
        found = detect(own, ["", "fox"], scores=["magnitude", "anisotropy", "sharpness"], **SHORT)
        for name in found.names:
            np.testing.assert_allclose(found.steps[name][0], 0, atol=1e-5)
        assert found.steps["magnitude"][1].min() > 1e-4


def test_the_scores_are_those_of_a_plain_loop_over_the_stock_pipeline(denoiser, stock, all_scores):
    """The stock pipeline runs by itself; its UNet's outputs are looked at from outside."""
    from memtrain.audit.denoiser import generation_seeds

    for prompt, expected in zip(PROMPTS, all_scores.steps["magnitude"], strict=True):
        for seed, steps in zip(generation_seeds(prompt, 2, 0), expected, strict=True):
            found = []
            hook = stock.unet.register_forward_hook(
                lambda unet, inputs, output, found=found: found.append(
                    (output[0][1].double() - output[0][0].double()).square().sum().sqrt().item()
                )
            )
            start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
            stock(prompt, latents=start, num_inference_steps=4, guidance_scale=7.5, output_type="latent")
            hook.remove()
            np.testing.assert_allclose(steps, found[:2], atol=1e-4, rtol=1e-4)


def test_v_prediction_of_the_same_model_scores_the_same(pipeline_folder, all_scores):
    """v = (eps - sqrt(1 - abar) x_t) / sqrt(abar), exactly, of the network that predicts eps."""
    own = stable_diffusion(pipeline_folder)
    epsilon, alphas = own.unet.forward, own.scheduler.alphas_cumprod

    def velocity(sample, timestep, *args, **kwargs):
        noise = epsilon(sample, timestep, *args, **kwargs)[0]
        alpha = alphas[timestep].reshape(-1, 1, 1, 1)
        return ((noise - (1 - alpha).sqrt() * sample) / alpha.sqrt(),)

    own.unet.forward = velocity
    own.scheduler.register_to_config(prediction_type="v_prediction")
    found = detect(own, PROMPTS, scores=STEPWISE, **SHORT)
    for name in STEPWISE:
        np.testing.assert_allclose(found.steps[name], all_scores.steps[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("scores", [["magnitude"], ["attention_entropy", "magnitude"], ["sharpness"], list(STEPWISE)])
def test_forwards_are_as_many_as_stated_and_nothing_is_decoded(denoiser, monkeypatch, scores):
    rows = []
    monkeypatch.setattr(denoiser.model.vae, "decode", lambda *_: pytest.fail("decoded"))
    hook = denoiser.model.unet.register_forward_pre_hook(lambda unet, inputs: rows.append(len(inputs[0])))
    try:
        found = detect(denoiser, PROMPTS, scores=scores, **SHORT)
    finally:
        hook.remove()
    assert sum(rows) == found.evaluations * len(PROMPTS)
    if "bright_ending" not in scores:
        assert len(rows) == 2 * (1 + sum(name in ("anisotropy", "sharpness") for name in scores))  # stops at step 2


@pytest.mark.parametrize(("scores", "shares"), [(["magnitude"], True), (list(STEPWISE), False)])
def test_prompts_that_share_noise_score_as_by_themselves_for_fewer_forwards(denoiser, monkeypatch, scores, shares):
    shared = dict(scores=scores, shared_noise=3, **SHORT)
    rows = []
    hook = denoiser.model.unet.register_forward_pre_hook(lambda unet, inputs: rows.append(len(inputs[0])))
    try:
        found = detect(denoiser, PROMPTS, **shared)
    finally:
        hook.remove()
    seeds = [DetectionSettings(2, shared_noise=3).seeds(prompt) for prompt in PROMPTS]
    assert all(len(set(own)) == 2 for own in seeds) and len({seed for own in seeds for seed in own}) <= 3
    own_noise = detect(denoiser, PROMPTS, scores=scores, **SHORT)
    made = len({seed for own in seeds for seed in own}) if shares else 0
    assert sum(rows) == found.evaluations * len(PROMPTS) + made
    assert own_noise.evaluations - found.evaluations == (2 if shares else 0)  # n rows of the first step
    # the same x_T, each prompt with a forward of its own for both sides
    monkeypatch.setattr(scoring.Plan, "shares_first_nulls", False)
    plain = detect(denoiser, PROMPTS, **shared)
    for name in plain.steps:
        np.testing.assert_allclose(found.steps[name], plain.steps[name], atol=1e-5, rtol=1e-5)
    other = detect(denoiser, [PROMPTS[2], PROMPTS[0]], **shared)  # whatever else is in the list
    np.testing.assert_allclose(other.scores, found.scores[[2, 0]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [stable_diffusion_xl, stable_diffusion_3, flux, flux2_klein])
def test_every_family_shares_noise(pipeline, monkeypatch, family):
    own = family(pipeline)
    shared = dict(scores=["magnitude", "sharpness"], shared_noise=3, **SHORT)
    found = detect(own, ["", *PROMPTS], **shared)
    monkeypatch.setattr(scoring.Plan, "shares_first_nulls", False)
    plain = detect(own, ["", *PROMPTS], **shared)
    for name in plain.steps:
        np.testing.assert_allclose(found.steps[name], plain.steps[name], atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(found.steps["magnitude"][0, :, 0], 0, atol=1e-5)  # the empty prompt


def test_each_score_states_its_cost():
    plan = Plan(DetectionSettings(4, 5, 50), tuple(named_scores(list(STEPWISE))), (TiledL2Density(),))
    assert plan.evaluations_alone() == {
        "magnitude": 40,
        "anisotropy": 80,
        "attention_entropy": 40,
        "bright_ending": 400,
        "sharpness": 80,
        "tiled_l2": 400,
    }
    assert plan.evaluations() == 480


def test_sdxl_takes_every_score(xl_pipeline):
    found = detect(xl_pipeline, PROMPTS, scores=[*STEPWISE, "tiled_l2"], **SHORT)
    assert all(np.isfinite(found.of(name)).all() for name in found.names) and len(found.names) == 6


def test_densities_of_finished_pictures(denoiser):
    network = torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten())
    density = EmbeddingDensity(network, side=64)
    found = detect(denoiser, PROMPTS[:2], scores=["tiled_l2", density], **SHORT)
    assert found.main == "tiled_l2" and found.scores.shape == (2,) and (found.scores < 0).all()
    assert (np.abs(found.of("embedding")) <= 1 + 1e-6).all()
    same = np.zeros((3, 8, 8, 3), np.uint8)
    assert TiledL2Density().of_prompt(same) == 0 and density.of_prompt(same) == pytest.approx(1)
    with pytest.raises(ValueError, match="num_images_per_prompt must be >= 2"):
        detect(denoiser, PROMPTS[:1], scores=["tiled_l2"], num_images_per_prompt=1)


def test_tiled_distance_is_that_of_the_worst_tile():
    images = torch.zeros(2, 3, 8, 8)
    images[1, :, :2, 2:4] = 0.5
    assert tiled_distance(images).tolist() == [0.5]  # a plain l2 distance says 0.125


def test_a_stopped_call_goes_on_and_damaged_parts_are_redone(denoiser, tmp_path, monkeypatch, all_scores, caplog):
    calls = []
    original = scoring.score_prompts

    def interrupted(denoiser, plan, prompts, batches, nulls):
        calls.append(list(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(denoiser, plan, prompts, batches, nulls)

    monkeypatch.setattr(scoring, "score_prompts", interrupted)
    monkeypatch.setattr(spread, "SECONDS_A_PART", 0.0)
    options = dict(scores=["magnitude"], batch_size=1, out=tmp_path, **SHORT)
    with pytest.raises(KeyboardInterrupt):
        detect(denoiser, PROMPTS, **options)
    kept = sorted((tmp_path / "parts").glob("[!.]*"))
    assert len(kept) == 2 and calls == [[PROMPTS[0]], [PROMPTS[1]], [PROMPTS[2]]]
    kept[0].write_bytes(b"PAR1 cut short")
    (tmp_path / "parts" / f".{kept[1].name}").write_bytes(kept[1].read_bytes())  # killed before it was renamed
    with caplog.at_level(logging.INFO):
        found = detect(denoiser, PROMPTS, **options)
    assert calls[3:] == [[PROMPTS[0]], [PROMPTS[2]]] and found.newly_scored == 2
    assert "is damaged" in caplog.text and "1 of 3 prompts are scored already" in caplog.text
    np.testing.assert_allclose(found.steps["magnitude"], all_scores.steps["magnitude"], atol=1e-5, rtol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.parquet", "settings.json"]
    assert detect(denoiser, PROMPTS, **options).newly_scored == 0


def test_scores_of_something_else_are_refused_or_redone_loudly(denoiser, tmp_path, caplog):
    options = dict(num_images_per_prompt=1, num_inference_steps=4, out=tmp_path)
    detect(denoiser, PROMPTS[:1], **options)
    with pytest.raises(ValueError, match=r"holds scores of another run \(settings differ\).*overwrite=true"):
        detect(denoiser, PROMPTS[:1], seed=1, **options)
    with pytest.raises(ValueError, match=r"\(prompts, scores differ\)"):
        detect(denoiser, PROMPTS[:2], scores=[Sharpness(delta=0.2)], **options)
    found = detect(denoiser, PROMPTS[:1], seed=1, overwrite=True, **options)
    assert found.newly_scored == 1 and "thrown away: settings differ" in caplog.text


def test_out_of_memory_halves_the_batch_and_gives_the_same(denoiser, monkeypatch, all_scores, caplog):
    original = Denoiser.predict_pair

    def small(self, latents, *rest):
        if len(latents) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(self, latents, *rest)

    monkeypatch.setattr(Denoiser, "predict_pair", small)
    found = detect(denoiser, PROMPTS, scores=["magnitude"], batch_size=16, **SHORT)
    assert "out of memory with 6 rows at a time; going on with 3" in caplog.text
    np.testing.assert_allclose(found.steps["magnitude"], all_scores.steps["magnitude"], atol=1e-5, rtol=1e-5)


def test_groups_are_told_from_all_others():
    scores = np.array([5.0, 4.0, 1.0, 2.0, 3.0, 0.0])
    labels = np.array([True, True, True, False, False, False])
    found = by_group(scores, labels, ["verbatim", "verbatim", "template", "", "", ""], [0.01])
    assert list(found) == ["verbatim", "template"]
    assert found["verbatim"]["auc"]["value"] == 1 and found["template"]["auc"]["value"] == pytest.approx(1 / 3)
    steps = np.stack([scores, -scores], axis=1)[:, None]  # (P, 1, 2): the second step says the opposite
    first, second = by_step(steps, labels)
    assert first["auc"] == 1 - second["auc"] and second["auc_mean_to_here"] == 0.5


def test_roc_ends_in_the_corners_and_holds_the_auc():
    scores = np.array([3.0, 2.0, 2.0, 1.0, 2.0, 0.0])
    labels = np.array([True, True, False, False, True, False])
    fpr, tpr = roc(scores, labels)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(tpr, fpr) == pytest.approx((3 + 2.5 + 2.5) / 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prompts=[]), "prompts is an empty list"),
        (dict(labels=[True]), "labels must have one entry a prompt: got 1 for 3"),
        (dict(labels=[True] * 3), "all 3 prompts are memorized and none is other"),
        (dict(labels=[False] * 3), "all 3 prompts are other and none is memorized"),
        (dict(scores=[]), "scores is an empty list"),
        (dict(scores=["wen"]), "there is no score wen; use magnitude, "),
        (dict(scores=["embedding"]), "score embedding needs a network"),
        (dict(scores=["magnitude", "magnitude"]), "scores names one twice"),
        (dict(num_scored_steps=51), r"num_scored_steps must be <= num_inference_steps \(50\), got 51"),
        (dict(num_images_per_prompt=0), "num_images_per_prompt must be >= 1, got 0"),
        (dict(shared_noise=3), r"shared_noise must be at least num_images_per_prompt \(4\) or null, got 3"),
    ],
)
def test_what_makes_no_sense_is_one_line(denoiser, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        detect(denoiser, **(dict(prompts=PROMPTS) | options))
    assert "\n" not in str(raised.value)


def test_a_pipeline_of_another_kind_is_refused(denoiser):
    with pytest.raises(ValueError, match="a AutoencoderKL cannot be audited; model takes a Stable Diffusion"):
        detect(denoiser.model.vae, PROMPTS)


def config(**changes):
    """conf/detect.yaml without Hydra."""
    cfg = OmegaConf.load(config_folder() / "detect.yaml")
    plain = {"num_images_per_prompt": 2, "num_inference_steps": 4, "device": "cpu"} | changes
    return OmegaConf.merge({key: cfg[key] for key in cfg if key not in ("defaults", "hydra")}, plain)


def test_the_command_writes_table_summary_and_plots(pipeline_folder, tmp_path, capsys):
    (tmp_path / "p.csv").write_text(
        "caption,group,kind\n<script>alert(1)</script>,canary,verbatim\n"
        "[bold]$x_1$ {y}\x1b[31m,canary,template\n"
        "fox,reference,\ncat,reference,\n"
    )
    model = {"pretrained": str(pipeline_folder)}
    cfg = config(
        model=model,
        prompts=str(tmp_path / "p.csv"),
        label="group",
        group="kind",
        out=str(tmp_path / "out"),
        num_scored_steps=2,
    )
    command(cfg)
    said = capsys.readouterr().out
    assert "<script>alert(1)</script>" in said and "\x1b" not in said and "verbatim" in said
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == [
        "distributions.png",
        "roc.png",
        "scores.parquet",
        "settings.json",
        "steps.png",
        "summary.json",
    ]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    figures = summary["scores"]["magnitude"]
    assert set(figures["groups"]) == {"verbatim", "template"} and len(figures["by_step"]) == 2
    assert 0 <= figures["auc"]["low"] <= figures["auc"]["value"] <= figures["auc"]["high"] <= 1
    rows = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    assert [row["label"] for row in rows] == [True, True, False, False] and not rows[2]["flagged"]
    assert np.shape(rows[0]["magnitude_steps"]) == (2, 2)
    assert rows[0]["magnitude"] == pytest.approx(np.mean(rows[0]["magnitude_steps"]))
    cfg.max_fpr = []
    with pytest.raises(ValueError, match=r"max_fpr is an empty list; say max_fpr=0\.01"):
        command(cfg)
    cfg.max_fpr, cfg.column = 0.01, "words"
    with pytest.raises(ValueError, match=r"prompts\.column=words"):
        command(cfg)


def test_the_command_without_labels(pipeline_folder, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("fox\ncat\n")
    model = {"pretrained": str(pipeline_folder)}
    command(config(model=model, prompts=str(tmp_path / "p.txt"), out=str(tmp_path / "out"), threshold=0.0))
    assert "2 prompts flagged" in capsys.readouterr().out and not (tmp_path / "out" / "roc.png").exists()
    with pytest.raises(ValueError, match="say prompts=FILE, or memorized=FILE other=FILE"):
        command(config(model=model, memorized=str(tmp_path / "p.txt")))


def test_a_prompt_whose_scores_are_not_finite_is_counted_and_in_no_figure(
    pipeline_folder, tmp_path, capsys, caplog, monkeypatch
):
    at = Magnitude.at

    def overflows(self, denoiser, step):
        lost = torch.tensor([prompt == "fox" for prompt in step.prompts])
        return at(self, denoiser, step).masked_fill(lost, torch.nan)

    monkeypatch.setattr(Magnitude, "at", overflows)
    (tmp_path / "p.csv").write_text("caption,label\nfox,1\ncat,1\nowl,0\nbee,0\n")
    model = {"pretrained": str(pipeline_folder)}
    command(config(model=model, prompts=str(tmp_path / "p.csv"), label="label", out=str(tmp_path / "out")))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["not_finite"] == 1 and summary["prompts"] == 3 and summary["scores"]["magnitude"]["memorized"] == 1
    assert "1 of 4 prompts have scores that are not finite" in caplog.text
    rows = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    assert len(rows) == 4 and not rows[0]["flagged"]
    monkeypatch.setattr(Magnitude, "at", lambda self, denoiser, step: at(self, denoiser, step) * torch.nan)
    with pytest.raises(ValueError, match="no prompt has finite scores in dtype=float32"):
        command(config(model=model, prompts=str(tmp_path / "p.csv"), out=str(tmp_path / "none")))


def test_both_spellings_of_columns():
    typed = [
        "model=/a (b)/c",
        "prompts=it's.csv",
        "prompts.column=Alt text",
        "prompts.label=null",
        "seed=1",
        "--help",
    ]
    assert spelled("detect", typed) == [
        "model.pretrained='/a (b)/c'",
        r"prompts='it\'s.csv'",
        "column='Alt text'",
        "label=null",
        "seed=1",
        "--help",
    ]


def test_the_benchmark_compares_equal_scores(denoiser):
    speed = measure_detection(
        denoiser, PROMPTS, rounds=1, num_images_per_prompt=2, num_scored_steps=2, num_inference_steps=4, shared_noise=3
    )
    assert speed.largest_difference < 1e-4
    assert min(speed.memtrain, speed.memtrain_shared, speed.stopped_loop, speed.whole_loop) > 0
    assert f"{speed.ratios['shared_against_stopped_loop']:.2f} times" in str(speed)
