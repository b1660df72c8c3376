import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from memtrain.audit.attack import Attack
from memtrain.audit.batches import ShrinkingBatches
from memtrain.audit.denoiser import Denoiser
from memtrain.audit.evaluate.fid import LatentGrid
from memtrain.audit.evaluate.judging import judge, summarise
from memtrain.audit.evaluate.results import ModelResult
from memtrain.audit.evaluate.settings import Measures, Settings
from memtrain.audit.evaluate.several_models import ModelsSpread, evaluate, names_of, read_rows, short_names
from memtrain.audit.evaluate.similarity import LatentRmse
from memtrain.audit.margin import CaptionMargin, caption_margin
from memtrain.audit.sampling import generate
from memtrain.audit.training_samples import TrainingSamples, choose, draw_positions
from memtrain.cli.arguments import spelled
from memtrain.cli.evaluate import _write as write_results
from memtrain.cli.evaluate import evaluate as command
from memtrain.cli.main import config_folder
from memtrain.data.distribute import Part
from memtrain.data.samples import ShardSamples
from memtrain.report.gallery import write_gallery
from tests.support.networks import CPU, Descriptor, scripted

SETTINGS = dict(
    num_images_per_prompt=2,
    num_inference_steps=2,
    guidance_scale=3.0,
    timesteps_per_sample=3,
    fid_samples=6,
    gallery=4,
    false_copies=0.01,
    nearest=None,
    seed=5,
)
SCRIPT = "<script>alert(1)</script> a fox"


@pytest.fixture(scope="module")
def samples(corpus) -> ShardSamples:
    return ShardSamples(str(corpus), 64)


@pytest.fixture(scope="module")
def canaries(samples, tmp_path_factory):
    """As training writes them: two canaries, one of a hostile caption, and three reference samples."""
    path = tmp_path_factory.mktemp("run") / "canaries.csv"
    groups = {3: "canary", 20: "canary", 40: "reference", 41: "reference", 47: "reference"}
    rows = [(samples.key(position), samples.get(position)[1], group) for position, group in groups.items()]
    rows[1] = (rows[1][0], SCRIPT, "canary")
    rows.append((samples.key(30), "", "held_out"))
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("key", "caption", "group"), *rows])
    return path


def run(models, samples, chosen, out, batch_size=4, measures=None, **changed) -> list[ModelResult]:
    measures = measures or Measures(LatentRmse(), LatentGrid(), None)
    settings = Settings(**(SETTINGS | changed))
    options = dict(batch_size=batch_size, device="cpu", dtype="float32", draw=write_gallery)
    return evaluate([str(model) for model in models], samples, chosen, measures, settings, out, **options)


@pytest.fixture(scope="module")
def evaluated(pipeline_folder, samples, canaries, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    chosen = choose(samples, str(canaries), "group", 10, seed=0)
    return out, run([pipeline_folder], samples, chosen, out)[0], chosen


def test_results_are_the_same_for_any_batch_size(evaluated, pipeline_folder, samples, tmp_path):
    out, result, chosen = evaluated
    for batch_size in (1, 16):
        again = run([pipeline_folder], samples, chosen, tmp_path / str(batch_size), batch_size)[0]
        for group, other in zip(result.groups, again.groups, strict=True):
            assert vars(other) == pytest.approx(vars(group), abs=1e-5)
        assert again.frechet_distance == pytest.approx(result.frechet_distance, rel=1e-3)
        rows, others = read_rows(out, [result]), read_rows(tmp_path / str(batch_size), [again])
        assert rows["seed"] == others["seed"]
        assert np.allclose(rows["latent_rmse"], others["latent_rmse"], atol=1e-5)
        assert np.allclose(rows["denoising_loss"], others["denoising_loss"], atol=1e-5)


def test_the_loss_is_the_networks_at_fixed_draws(evaluated, pipeline_folder, samples):
    """Against a plain loop over one sample, with diffusers' own noising."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    from memtrain.core.diffusion import DDPM, draw
    from memtrain.core.streams import Stream

    out, result, chosen = evaluated
    pipe = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None, local_files_only=True)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    process, losses = DDPM(scheduler.alphas_cumprod, "epsilon"), []
    with torch.no_grad():
        image, _, _ = samples.get(chosen.positions[1])
        latents = pipe.vae.encode(torch.from_numpy(image)[None].float() / 127.5 - 1).latent_dist.mean
        latents = latents * pipe.vae.config.scaling_factor
        cut = dict(padding="max_length", max_length=24, truncation=True, return_tensors="pt")
        hidden = pipe.text_encoder(pipe.tokenizer(SCRIPT, **cut).input_ids)[0]
        for number, t in enumerate((166, 500, 833)):
            noise = draw(5, Stream.HELD_OUT, number, [chosen.positions[1]], latents.shape[1:], process).noise
            noisy = scheduler.add_noise(latents, noise, torch.tensor([t]))
            losses.append((pipe.unet(noisy, t, hidden).sample - noise).square().mean().item())
    rows = read_rows(out, [result]).to_pylist()
    (mine,) = {row["denoising_loss"] for row in rows if row["caption"] == SCRIPT}
    assert mine == pytest.approx(np.mean(losses), rel=1e-4)
    assert result.heldout_loss == pytest.approx(
        np.mean([row["denoising_loss"] for row in rows if row["group"] == "reference"]), rel=1e-6
    )


def test_generations_are_the_denoisers_and_their_distance_is_to_their_own_training_image(
    evaluated, pipeline_folder, samples
):
    from memtrain.audit.pictures import encode_images
    from memtrain.audit.training_samples import read_pictures

    out, result, _ = evaluated
    denoiser = Denoiser.load(str(pipeline_folder), "cpu")
    for row in read_rows(out, [result]).to_pylist()[::3]:
        latents = generate(denoiser, denoiser.encode([row["caption"]]), [row["seed"]], 2, 3.0)
        original = read_pictures(samples, samples.find([row["key"]]).tolist(), (64, 64))
        difference = latents - encode_images(denoiser, original, ShrinkingBatches(1))
        assert row["latent_rmse"] == pytest.approx(difference.square().mean().sqrt().item(), rel=1e-4)


def test_a_judge_says_how_much_of_its_caption_a_generation_shows(evaluated, pipelines, samples, tmp_path):
    _, result, chosen = evaluated
    model, judge_folder = pipelines.values()
    denoiser, other = Denoiser.load(str(model), "cpu"), Denoiser.load(str(judge_folder), "cpu")
    measures = Measures(LatentRmse(), LatentGrid(), None, CaptionMargin(other, ShrinkingBatches(4)))
    (found,) = run([model], samples, chosen, tmp_path, measures=measures)
    assert found.identity != result.identity and result.memorization.caption_margin is None
    rows = [row for row in read_rows(tmp_path, [found]).to_pylist() if row["group"] == "canary"]
    assert found.memorization.caption_margin == pytest.approx(np.mean([row["caption_margin"] for row in rows]))
    for row in rows[:2]:
        latents = generate(denoiser, denoiser.encode([row["caption"]]), [row["seed"]], 2, 3.0)
        pixels = denoiser.model.decode(latents)
        by_hand = caption_margin(other, pixels, [row["caption"]], [row["seed"]], ShrinkingBatches(1))
        assert row["caption_margin"] == pytest.approx(by_hand.item(), abs=1e-4) and by_hand.item() != 0


def test_the_copy_rate_of_a_case_by_hand():
    """Two generations of each of two canaries; one of a reference caption, which sets the cut."""
    similarity = LatentRmse(0.25)
    rows = [
        {
            "group": "canary",
            "latent_rmse": own,
            "nearest_latent_rmse": nearest,
            "denoising_loss": 1.0,
            "clip_score": None,
            "caption_margin": None,
            "attacked": False,
        }
        for own, nearest in ((0.1, 0.1), (0.3, 0.15), (0.21, 0.21), (0.5, 0.4))
    ]
    under_attack = [row | {"attacked": True, "latent_rmse": 0.01} for row in rows[:3]] + [rows[3] | {"attacked": True}]
    reference = {"group": "reference", "latent_rmse": 0.1, "nearest_latent_rmse": 0.2, "denoising_loss": 9.0}
    rows += [*under_attack, reference | {"clip_score": None, "caption_margin": None, "attacked": False}]
    cut, reach = judge(rows, [row["group"] == "reference" for row in rows], similarity, 0.01)
    assert 0.1999 < cut.distance < 0.2 and reach is None
    found = summarise(rows, "canary", 2, similarity)
    assert (found.copy_rate, found.copy_rate_nearest, found.samples_copied) == (0.25, 0.5, 0.5)
    assert (found.copy_rate_low, found.copy_rate_high) == (0, 0.5)
    assert found.copy_rate_attacked == 0.75
    assert (found.copy_rate_attacked_low, found.copy_rate_attacked_high) == (0.5, 1)
    assert summarise(rows, "reference", 1, similarity).copy_rate_attacked is None
    assert found.copy_rate_beyond_reach is None  # it is not known what the attack describes by itself
    described = rows[-1] | {"attacked": True, "latent_rmse": 0.05}
    again = [*rows, described]
    same, reach = judge(again, [row["group"] == "reference" for row in again], similarity, 0.01)
    assert same == cut and 0.0499 < reach < 0.05 and described["is_copy"] and not described["is_beyond_reach"]
    assert summarise(again, "canary", 2, similarity).copy_rate_beyond_reach == 0.75
    far = [*rows, described | {"latent_rmse": 0.9}]  # an attack that describes nothing: the cut itself
    assert judge(far, [row["group"] == "reference" for row in far], similarity, 0.01)[1] == cut.distance
    assert found.similarity == pytest.approx(0.2775) and found.similarity_nearest == pytest.approx(0.1075)


def test_the_nearest_is_of_all_pictures_but_those_that_were_held_out(evaluated, pipeline_folder, samples):
    """Against a loop over the corpus; the cut is just below what a reference caption's generation reaches."""
    from memtrain.audit.batches import ShrinkingBatches
    from memtrain.audit.pictures import encode_images
    from memtrain.audit.sampling import generate
    from memtrain.audit.training_samples import read_pictures

    out, result, _ = evaluated
    rows = read_rows(out, [result]).to_pylist()
    denoiser, trained = Denoiser.load(str(pipeline_folder), "cpu"), [p for p in range(48) if p not in (30, 40, 41, 47)]
    pictures = encode_images(denoiser, read_pictures(samples, trained, (64, 64)), ShrinkingBatches(16))
    for row in rows[::4]:
        latents = generate(denoiser, denoiser.encode([row["caption"]]), [row["seed"]], 2, 3.0)
        distances = (latents - pictures).square().flatten(1).mean(dim=1).sqrt()
        assert row["nearest_key"] == samples.key(trained[int(distances.argmin())])
        assert row["nearest_latent_rmse"] == pytest.approx(distances.min().item(), rel=1e-4)
    least = min(row["nearest_latent_rmse"] for row in rows if row["group"] == "reference")
    assert result.searched == 44 and result.cut == pytest.approx(min(0.5, least), rel=1e-5)
    assert result.kernel_distance is not None and result.cut < max(0.5 + 1e-9, least)


def test_at_a_huge_bound_without_a_reference_all_are_copies_and_at_a_tiny_one_none(pipeline_folder, samples, tmp_path):
    chosen = TrainingSamples([3], [samples.key(3)], [SCRIPT], ["canary"])
    for bound, rate in ((1e-9, 0), (1e9, 1)):
        measures = Measures(LatentRmse(bound), LatentGrid(), None)
        result = run([pipeline_folder], samples, chosen, tmp_path / str(rate), measures=measures, nearest=5)[0]
        assert [(g.copy_rate, g.copy_rate_nearest, g.samples_copied) for g in result.groups] == [(rate, rate, rate)]
        assert "bound alone" in result.cut_is and result.searched <= 6 and result.groups[0].copy_rate_low is None
        page = (tmp_path / str(rate) / result.model / "gallery.html").read_text(encoding="utf-8")
        assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; a fox" in page


def test_a_torchscript_file_judges_instead_of_the_stand_in(pipeline_folder, samples, canaries, tmp_path):
    from memtrain.audit.evaluate.similarity import Sscd

    path = scripted(Descriptor(), tmp_path / "sscd.pt")
    measures = Measures(Sscd(path, CPU), LatentGrid(), None)
    chosen = choose(samples, str(canaries), "group", 1, seed=0)
    result = run([pipeline_folder], samples, chosen, tmp_path, measures=measures)[0]
    rows = read_rows(tmp_path, [result])
    assert (
        result.measure == "SSCD"
        and result.cut >= 0.5
        and result.copy_rule.startswith("SSCD > ")
        and "sscd" in rows.column_names
        and "latent_rmse" not in rows.column_names
    )
    assert np.abs(np.array(rows["sscd"])).max() <= 1 + 1e-6


def test_the_gallery_shows_the_nearest_first_and_a_script_as_text(evaluated, pipeline_folder):
    out, result, _ = evaluated
    page = (out / result.model / "gallery.html").read_text(encoding="utf-8")
    rows = sorted(read_rows(out, [result]).to_pylist(), key=lambda row: row["latent_rmse"])
    places = [page.index(f"RMSE of latents {row['latent_rmse']:.3f}") for row in rows[:4]]
    assert places == sorted(places) and page.count("<figure>") == 8
    assert "<script" not in page


class Own(Attack):
    """Has the fields of no attack, and is another."""


def test_a_model_is_evaluated_once_for_the_same_settings(evaluated, pipeline_folder, samples, tmp_path):
    _, result, chosen = evaluated
    out = tmp_path / "out"
    shutil.copytree(evaluated[0], out)
    told = []

    def again(**changed) -> int:
        told.clear()
        settings = Settings(**(SETTINGS | changed))
        measures = Measures(LatentRmse(), LatentGrid(), None)
        (found,) = evaluate(
            [str(pipeline_folder)], samples, chosen, measures, settings, out,
            batch_size=8, device="cpu", dtype="float32", draw=write_gallery, advance=lambda *said: told.append(said),
        )  # fmt: skip
        assert (found.identity == result.identity) == (not changed)
        return len(told)

    assert again() == 0
    assert again(seed=6) > 0 and again(attack=Own()) > 0
    (out / result.model / "result.json").write_text('{"identity": ', encoding="utf-8")  # the disk was full
    assert again() > 0 and again() == 0


def test_parts_are_of_the_models_and_merge_asks_for_all_of_them(
    evaluated, pipeline_folder, pipelines, samples, tmp_path
):
    shutil.copytree(evaluated[0], tmp_path / "out")
    models, seen = [str(pipeline_folder), str(pipelines["v_prediction"])], evaluated[1]

    def of(spread: ModelsSpread) -> list[str]:
        settings, measures = Settings(**SETTINGS), Measures(LatentRmse(), LatentGrid(), None)
        options = dict(batch_size=4, device="cpu", dtype="float32", draw=write_gallery, spread=spread)
        found = evaluate(models, samples, evaluated[2], measures, settings, tmp_path / "out", **options)
        return [result.identity for result in found]

    assert of(ModelsSpread(part=Part(1, 3))) == [seen.identity] and of(ModelsSpread(part=Part(3, 3))) == []
    with pytest.raises(ValueError, match="merge: v_prediction is not evaluated yet"):
        of(ModelsSpread(merge=True))


def test_models_are_named_by_what_tells_them_apart():
    assert short_names(["runs/cmp/none/export", "runs/cmp/evidence/export"]) == ["none", "evidence"]
    assert short_names(["a/none/export", "b/none/export"]) == ["a_none", "b_none"]
    assert short_names(["CompVis/stable-diffusion-v1-4"]) == ["stable-diffusion-v1-4"]
    assert short_names(["../a b$"]) == ["a_b_"]
    with pytest.raises(ValueError, match="models names x/export twice"):
        short_names(["x/export", "y", "x/export"])
    assert short_names(["x/a b", "x/a_b"]) == ["x_a_b_0", "x_a_b_1"]
    assert names_of(["sd", "sd"], ["runs/a/export", None]) == ["a", "sd"]
    assert names_of(["sd", "other"], ["lora", "lora"]) == ["sd", "other"]  # one adapter in two models
    assert names_of(["sd", "sd", "other"], ["a", "b", "a"]) == ["sd_a", "sd_b", "other_a"]
    with pytest.raises(ValueError, match="models names lora twice"):
        names_of(["sd", "sd"], ["lora", "lora"])


def test_samples_are_those_of_the_file_the_first_of_each_group(samples, canaries, tmp_path):
    chosen = choose(samples, str(canaries), "group", 2, seed=0)
    assert chosen.positions == [3, 20, 40, 41] and chosen.captions[1] == SCRIPT
    assert chosen.groups == ["canary"] * 2 + ["reference"] * 2
    assert chosen.never_trained_on() == {30, 40, 41, 47}  # the first and the last are not judged
    held_out = pa.table({"key": [samples.key(p) for p in (3, 9, 47)], "group": ["canary", "held_out", "reference"]})
    pq.write_table(held_out, tmp_path / "held_out.parquet")
    chosen = choose(samples, str(tmp_path / "held_out.parquet"), "group", 9, seed=0)
    assert chosen.positions == [3, 47] and chosen.never_trained_on() == {9, 47}
    table = pa.table({"key": [samples.key(5), samples.key(2)], "kind": [7, None]})
    pq.write_table(table, tmp_path / "list.parquet")
    chosen = choose(samples, str(tmp_path / "list.parquet"), "kind", 9, seed=0)
    assert chosen.groups == ["7", "samples"] and chosen.captions == [samples.get(p)[1] for p in (5, 2)]
    assert choose(samples, str(tmp_path / "list.parquet"), "group", 9, seed=0).groups == ["samples"] * 2


def test_samples_are_drawn_by_seed(samples):
    one, again, other = (choose(samples, None, "group", 9, seed) for seed in (1, 1, 2))
    assert one == again and one.positions != other.positions and len(set(one.positions)) == 9
    assert sorted(draw_positions(samples, 1000, 3)) == list(range(48))


def test_what_is_wrong_with_the_samples_is_said_in_one_line(samples, tmp_path):
    for name, text, group, said in (
        ("columns.csv", "name,caption\na,b\n", "group", "has no column key .*, but 'name', 'caption'"),
        ("foreign.csv", "key\n00000.tar/nowhere\n", "group", "no sample 00000.tar/nowhere in data.shards"),
        ("empty.csv", "key,caption\n", "group", "is empty"),
        ("nothing.csv", "", "group", "has no column key .*, but nothing"),
        ("group.csv", "key\nx\n", "kind", "samples.group=kind: .* has no such column, but 'key'"),
        ("latin.csv", b"key\n\xff\n", "group", "is no csv in UTF-8"),
        ("list.parquet", "no parquet", "group", "is no parquet file"),
        ("list.txt", "x", "group", "must end in .csv or .parquet"),
    ):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=said) as raised:
            choose(samples, str(tmp_path / name), group, 5, seed=0)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="no such file"):
        choose(samples, str(tmp_path / "gone.csv"), "group", 5, seed=0)
    with pytest.raises(ValueError, match=r"samples\.count must be >= 1, got 0"):
        choose(samples, None, "group", 0, seed=0)


def test_settings_out_of_range_are_refused():
    for changed in (
        dict(num_images_per_prompt=0),
        dict(num_inference_steps=0),
        dict(timesteps_per_sample=0),
        dict(gallery=-1),
    ):
        with pytest.raises(ValueError, match=f"{next(iter(changed))} must be >= "):
            Settings(**(SETTINGS | changed))


def test_the_short_spellings_are_the_keys_values():
    typed = ["model=runs/a=1/export", "data=/d/{00000..00003}.tar", "samples=it's.csv", "seed=1"]
    assert spelled("evaluate", typed) == [
        "models='runs/a=1/export'",
        "data.shards='/d/{00000..00003}.tar'",
        r"samples.file='it\'s.csv'",
        "seed=1",
    ]
    assert spelled("evaluate", ["models=[a,b]", "data=[a,b]", "data.caption=top", "--help"]) == [
        "models=[a,b]", "data.shards=[a,b]", "data.caption=top", "--help",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="not both"):
        spelled("evaluate", ["model=a", "models=[b]"])


def config(**changed) -> DictConfig:
    """conf/evaluate.yaml, as Hydra would compose it."""
    plain = OmegaConf.load(config_folder() / "evaluate.yaml")
    values = {name: value for name, value in plain.items() if name not in ("defaults", "hydra")}
    values["attack"] = OmegaConf.load(config_folder() / "attack" / "none.yaml")
    return OmegaConf.merge(values, changed)


def test_the_command_prints_a_table_and_writes_it_with_a_plane(
    pipelines, corpus, canaries, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "100")
    few = dict(
        num_images_per_prompt=1, num_inference_steps=1, timesteps_per_sample=1, fid_samples=4, gallery=2, device="cpu"
    )
    command(
        config(
            models=[str(folder) for folder in pipelines.values()],
            data={"shards": str(corpus)},
            samples={"file": str(canaries), "count": 2},
            judge=str(pipelines["epsilon"]),
            out=str(tmp_path / "[b]out"),
            **few,
        )
    )
    said, out = capsys.readouterr().out, tmp_path / "[b]out"
    assert "epsilon" in said and "v_prediction" in said and "canary" in said and "[b]out" in said
    assert "the judge's loss on its generation" in said.replace("\n", " ")
    assert "Fréchet distance of VAE latents: 2 generations against 4 pictures" in said and "SSCD" not in said
    assert "A copy of epsilon: RMSE of latents ≤ " in said and "44 training pictures searched" in said.replace(
        "\n", " "
    )
    with (out / "evaluation.csv").open(encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream))
    assert [(line["model"], line["group"]) for line in lines] == [
        (model, group) for model in ("epsilon", "v_prediction") for group in ("canary", "reference")
    ]
    found = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert float(lines[3]["denoising_loss"]) == found[1]["heldout_loss"]
    assert pq.read_table(out / "rows.parquet")["model"].to_pylist() == ["epsilon"] * 4 + ["v_prediction"] * 4
    with Image.open(out / "plane.png") as image:
        assert image.width > 500
    assert not list(out.rglob(".*"))  # nothing is left aside


def test_a_model_whose_figures_are_not_finite_costs_the_others_nothing(evaluated, caplog):
    out, result, _ = evaluated
    lost = replace(result, heldout_loss=float("nan"), kernel_distance=float("inf"))
    write_results(out, [result, lost])
    found = json.loads((out / "evaluation.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [one["heldout_loss"] for one in found] == [result.heldout_loss, None]
    assert (out / "plane.png").is_file() and "its loss is not finite" in caplog.text


def test_the_command_says_in_one_line_what_is_missing(pipeline_folder, corpus, tmp_path):
    (tmp_path / "empty").mkdir()
    model = str(pipeline_folder)
    for changed, said in (
        (dict(data={"shards": str(corpus)}), r"no model; name one with model=PATH"),
        (dict(models=model), "data is missing"),
        (dict(models=model, data={"shards": str(tmp_path / "empty")}), "empty"),
        (dict(models=[model, model], data={"shards": str(corpus)}), "names .* twice"),
        (dict(models=model, data={"shards": str(corpus)}, sscd="/no.pt"), "sscd=/no.pt: no such file"),
        (dict(models=str(tmp_path), data={"shards": str(corpus)}, out=str(tmp_path)), "is not a pipeline"),
    ):
        with pytest.raises(ValueError, match=said) as raised:
            command(config(device="cpu", **changed))
        assert "\n" not in str(raised.value)


def test_results_are_plain_json(evaluated):
    out, result, _ = evaluated
    found = json.loads((out / result.model / "result.json").read_text(encoding="utf-8"))
    assert found["groups"][0]["group"] == "canary" and found["copy_rule"] == f"RMSE of latents ≤ {result.cut:.3g}"
    assert result.memorization.group == "canary"
    assert (result.frechet_generated, result.frechet_real) == (6, 6)
