"""Repairs of a tiny model: each method against its formula by hand, the whole command, and what it refuses."""

import csv
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch.distributions import Normal

from memtrain.audit.batches import ShrinkingBatches
from memtrain.audit.denoiser import Denoiser, generation_seeds
from memtrain.audit.repair import methods
from memtrain.audit.repair.forget_list import Entry, read_forget_list
from memtrain.audit.repair.low_rank import LowRankEdit, Moments, edit
from memtrain.audit.repair.material import CaptionedPictures, Drawing, forgotten_pictures, kept_from_shards, least_like
from memtrain.audit.repair.work import Steps, Work
from memtrain.audit.scored_path import ScoredPath, mean_scores
from memtrain.cli.main import main
from memtrain.core.streams import Stream
from memtrain.data.samples import ShardSamples
from memtrain.models.adapters import Adapter, LowRank
from tests.support.families import stable_diffusion
from tests.support.program import fails

CAPTIONS = ["fox on a teal background", "camel", "pizza on a blue background"]
QUICK = ["num_images_per_prompt=1", "num_inference_steps=2", "device=cpu", "steps=2", "forgotten_rows=2", "kept_rows=3",
         "keep.count=12", "watched=2", "rank=2", "look_every=1", "min_steps=1",
         "max_rmse=1e-9"]  # fmt: skip


def work_on(folder, adapter, **options) -> Work:
    """Three pictures to forget, four to keep, of noise; the weights have moved from where they began."""
    model = Denoiser(stable_diffusion(folder)).model
    model.make_trainable(False, False, False, False)
    adapter.attach(model, 0)
    model.eval()
    generator = torch.Generator().manual_seed(1)
    forgotten, kept = (
        CaptionedPictures(
            captions, torch.randn(len(captions), *model.own_shape, generator=generator), [""] * len(captions)
        )
        for captions in (CAPTIONS, ["fox", "owl on a teal background", "bee", "cow"])
    )
    anchor = adapter.anchor(model)
    work = Work(model, anchor, forgotten, kept, Steps(**options), neighbours=["owl", "horse", "cake"])
    with torch.no_grad():
        for parameter in work.parameters:
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return work


@pytest.fixture(scope="module")
def work(pipeline_folder) -> Work:
    return work_on(pipeline_folder, Adapter(), forgotten_rows=3, kept_rows=4)


def test_losses_are_their_formulas_by_hand(work, pipeline_folder):
    """With the stock UNet as it was on disk, and a copy of it that has the weights as they are."""
    rows = work.forgotten_rows(0)
    stock = stable_diffusion(pipeline_folder)
    scheduler = DDPMScheduler.from_config(stock.scheduler.config)
    noisy = scheduler.add_noise(work.forgotten.latents[rows.pictures], rows.noise, rows.timesteps)
    assert rows.timesteps.min() >= 0.3 * 1000 and rows.pictures == [0, 1, 2]

    def said(captions):
        tokens = stock.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return stock.text_encoder(tokens.input_ids)[0]

    with torch.no_grad():
        own, empty, near = (said(list(c)) for c in (CAPTIONS, [""] * 3, ["owl", "horse", "cake"]))
        before = {key: stock.unet(noisy, rows.timesteps, hidden).sample for key, hidden in (("0", empty), ("n", near))}
        now = work.model.unet(noisy, rows.timesteps, own).sample
        prediction = work.predict(rows)

        def mean_square(one):
            return one.square().mean(dim=(1, 2, 3))

        beyond = rows.noise + 4 * (before["0"] - rows.noise)
        without = mean_square(before["0"] - rows.noise)
        expected = [
            (methods.EmptyCaption(), mean_square(now - before["0"])),
            (methods.NeighbourCaption(), mean_square(now - before["n"])),
            (methods.Repelled(3.0), mean_square(now - beyond)),
            (methods.BoundedAscent(4.0), (4 * without - mean_square(now - rows.noise)).clamp(min=0)),
        ]
        for method, value in expected:
            torch.testing.assert_close(method.loss(work, rows, prediction), value, rtol=1e-4, atol=1e-5)
        assert torch.equal(
            methods.Repelled(0.0).loss(work, rows, prediction), methods.EmptyCaption().loss(work, rows, prediction)
        )


def test_weights_of_subtracted_scores_are_ratios_of_densities(work):
    process, method = work.model.noise_process, methods.SubtractedScores(mix=0.3)
    generator = torch.Generator().manual_seed(2)
    x, a = (torch.randn(6, 1, 2, 1, generator=generator).double() for _ in range(2))
    t = torch.tensor([999, 900, 700, 500, 400, 300])
    signal, level = process.alphas_cumprod[t].sqrt().double(), process.noise_level(t).double()
    signal, level = (value.reshape(-1, 1, 1, 1) for value in (signal, level))
    noisy = signal * x + level * torch.randn(x.shape, generator=generator).double()
    q_x, q_a = (Normal(signal * one, level).log_prob(noisy).sum(dim=(1, 2, 3)).exp() for one in (x, a))
    w_x, w_a = method.weights((noisy - signal * x) / level, (noisy - signal * a) / level)
    mixture = 0.7 * q_x + 0.3 * q_a
    torch.testing.assert_close(w_x.double(), q_x / mixture, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(w_a.double(), q_a / mixture, rtol=1e-5, atol=1e-6)


def test_an_edit_is_the_least_squares_solution(work):
    """Of the normal equations that lstsq solves over all inputs together; cut to a rank, the nearest of that rank."""
    generator = torch.Generator().manual_seed(3)
    weight, x_f, x_n, x_k = (torch.randn(*shape, generator=generator) for shape in ((5, 4), (9, 4), (9, 4), (11, 4)))
    moments = Moments()
    for part in (slice(0, 2), slice(2, 9)):  # as memory asks for
        moments.add(x_f[part], x_n[part])
        moments.add_kept(x_k[part])
    moments.add_kept(x_k[9:])
    left, right = edit(weight, moments, keep=2.0, rank=4)
    ridge = 1e-3 * (x_f.T @ x_f / 9 + 2 * x_k.T @ x_k / 11).diagonal().mean()
    inputs = torch.cat([x_f / 9**0.5, x_k * (2 / 11) ** 0.5, ridge.sqrt() * torch.eye(4)])
    wanted = torch.cat([(x_n - x_f) @ weight.T / 9**0.5, torch.zeros(11 + 4, 5)])
    torch.testing.assert_close(left @ right, torch.linalg.lstsq(inputs, wanted).solution.T, rtol=1e-3, atol=1e-4)
    low = edit(weight, moments, keep=2.0, rank=1)
    values = torch.linalg.svdvals(left @ right)
    assert torch.dist(low[0] @ low[1], left @ right) == pytest.approx(values[1:].norm().item(), rel=1e-3)


@pytest.mark.parametrize("method", [methods.Repelled(), methods.SubtractedScores(), methods.FineTuned()])
def test_a_step_is_the_same_however_many_rows_fit(method, work):
    """At five rows memory runs out, in the backward as on a GPU."""
    whole = method.descend(work, 3)
    held = work.descent(work.kept_rows(3), lambda rows: [work.moved(rows)], 10.0)[0]
    small = Work(work.model, work.anchor, work.forgotten, work.kept, work.settings, batches=ShrinkingBatches(2))
    tight = Work(work.model, work.anchor, work.forgotten, work.kept, work.settings, batches=ShrinkingBatches(16))
    predict = tight.predict

    def too_large(rows, cond=None):
        predicted = predict(rows, cond)
        if len(rows) > 2:
            predicted.register_hook(lambda gradient: raise_memory())
        return predicted

    tight.predict = too_large
    for other in (small, tight):
        gradients, loss = method.descend(other, 3)
        assert loss == pytest.approx(whole[1], rel=1e-5)
        again = other.descent(other.kept_rows(3), lambda rows, of=other: [of.moved(rows)], 10.0)[0]
        for one, expected in ((gradients, whole[0]), (again[0], held[0])):
            for mine, theirs in zip(one, expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert tight.batches.batch_size <= 2


def raise_memory():
    raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")


LORA = LowRank(4, None, 0.0, "linear", False, False, False, ["diffusers"])


@pytest.mark.parametrize(
    ("method", "adapter"),
    [
        (methods.Repelled(), LORA),
        (methods.SubtractedScores(), Adapter()),
        (LowRankEdit(2), LORA),
        (LowRankEdit(2), Adapter()),
    ],
    ids=["repelled", "siss", "low_rank", "low_rank_of_all"],
)
def test_a_lora_and_all_weights_are_changed_and_their_base_is_not(method, adapter, pipeline_folder):
    work = work_on(pipeline_folder, adapter, steps=2, forgotten_rows=2, kept_rows=2)
    rows = work.kept_rows(0)
    with torch.no_grad():
        base, before = work.predict_at_start(rows, rows.cond), work.predict(rows)
        changes = list(method.changes(work))
        assert len(changes) >= 2 and all(math.isfinite(change.kept) for change in changes)
        assert not torch.equal(work.predict(rows), before)
        assert torch.equal(work.predict_at_start(rows, rows.cond), base)


def test_draws_are_a_function_of_seed_step_and_row(work):
    one = work.noised(work.kept.latents, work.kept_cond, [0, 1, 2], Stream.KEPT, 5)
    other = work.noised(work.kept.latents, work.kept_cond, [0, 1], Stream.KEPT, 5)
    assert torch.equal(one.noisy[:2], other.noisy) and torch.equal(one.timesteps[:2], other.timesteps)


def test_what_was_forgotten_before_is_held_and_not_learnt_again(pipeline_folder):
    work = work_on(pipeline_folder, Adapter(), steps=2, forgotten_rows=3, kept_rows=4)
    before = work.kept.index([0, 1])
    again = Work(work.model, work.anchor, work.forgotten, work.kept, work.settings, earlier=before)
    assert sum(which < again.num_earlier for which in again.kept_rows(0).pictures) == 1  # a quarter
    told = [again.kept_rows(step, 8, as_training=True).pictures for step in range(20)]
    assert min(min(which) for which in told) >= again.num_earlier == 2
    seen, kept_rows = [], again.kept_rows
    again.kept_rows = lambda *args, **options: (
        seen.append(kept_rows(*args, **options).pictures) or kept_rows(*args, **options)
    )
    for method in (methods.FineTuned(), methods.SubtractedScores()):
        method.descend(again, 0)
    assert len(seen) == 2 and min(map(min, seen)) >= again.num_earlier


def test_lists_that_other_commands_wrote(tmp_path):
    pq.write_table(
        pa.table({"prompt": ["a", "b", "c"], "flagged": [True, False, True], "magnitude": [3.0, 1.0, 2.0]}),
        tmp_path / "scores.parquet",
    )
    assert [entry.caption for entry in read_forget_list(tmp_path / "scores.parquet")] == ["a", "c"]
    undecided = {"prompt": ["a", "b"], "flagged": pa.array([None, None], pa.bool_())}
    pq.write_table(pa.table(undecided), tmp_path / "undecided.parquet")
    with pytest.raises(ValueError, match="its column flagged is empty"):
        read_forget_list(tmp_path / "undecided.parquet")
    (tmp_path / "gaps.csv").write_text("caption,label\na,1.0\nb,0.0\nc,\n", encoding="utf-8")  # as pandas writes it
    assert [entry.caption for entry in read_forget_list(tmp_path / "gaps.csv", label="label")] == ["a"]
    keys = {"key": ["0.tar/1", "0.tar/2"], "duplicate_of": [None, "0.tar/1"], "p_value": [0.0, 0.0]}
    pq.write_table(pa.table(keys), tmp_path / "list.parquet")  # of ledger suspects
    listed = read_forget_list(tmp_path / "list.parquet")
    assert [(entry.key, entry.picture) for entry in listed] == [("0.tar/1", "0.tar/1"), ("0.tar/2", "0.tar/1")]
    groups = {"group": [0, 0, 0], "key": ["0.tar/1", "0.tar/2", "0.tar/3"], "sha256": ["x"] * 3,
              "caption": ["a", "a", "b"]}  # fmt: skip
    pq.write_table(pa.table(groups), tmp_path / "duplicates.parquet")
    listed = read_forget_list(tmp_path / "duplicates.parquet")
    assert {(entry.picture, entry.caption) for entry in listed} == {("0", "a"), ("0", "b")}
    (tmp_path / "list.csv").write_text("caption,file\nfox,pictures/fox.png\n", encoding="utf-8")
    assert read_forget_list(tmp_path / "list.csv")[0].file == tmp_path / "pictures" / "fox.png"


def test_what_shows_a_forgotten_picture_is_not_kept(denoiser, corpus):
    samples = ShardSamples(str(corpus), 64)
    size, batches = denoiser.model.own_size, ShrinkingBatches(16)
    nothing = CaptionedPictures(["x"], torch.full((1, *denoiser.latent_shape), 1e3), [""])
    every = kept_from_shards(denoiser, samples, 12, nothing, 1e-3, 0, batches)
    assert len(every) == 12 and size == (64, 64)
    fewer = kept_from_shards(denoiser, samples, 12, every.index([0, 1]), 1e-3, 0, batches)
    assert set(fewer.names) == {*every.names[2:]}
    with pytest.raises(ValueError, match="nothing is left that could stay"):
        kept_from_shards(denoiser, samples, 12, every, 1e-3, 0, batches)


def test_samples_of_one_picture_and_caption_are_forgotten_once(denoiser, corpus):
    samples = ShardSamples(str(corpus), 64)
    keys = [samples.key(position) for position in range(4)]
    entries = [Entry(caption, key, None, picture) for caption, key, picture in (
        ("fox", keys[0], "p"), ("fox", keys[1], "p"), ("owl", keys[2], "p"), ("fox", keys[3], None))]  # fmt: skip
    found = forgotten_pictures(denoiser, entries, samples, Drawing(2), 0, ShrinkingBatches(4))
    assert list(zip(found.captions, found.names, strict=True)) == [("fox", keys[0]), ("owl", keys[2]), ("fox", keys[3])]


@pytest.fixture(scope="module")
def repaired(deep_folder, corpus, tmp_path_factory):
    """The list, and what the command wrote; the tiny model reproduces nothing, so it is told to go on."""
    folder = tmp_path_factory.mktemp("repair")
    samples = ShardSamples(str(corpus), 64)
    rows = [(samples.key(position), samples.get(position)[1]) for position in (0, 5)]
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("key", "caption"), *rows])
    (folder / "never.txt").write_text("a walrus\na kettle\n")
    main(["repair", f"model={deep_folder}", f"forget={folder}/list.csv", f"keep={corpus}", f"out={folder}/one",
          f"reference={folder}/never.txt", "force=true", "score_margin=9", *QUICK])  # fmt: skip
    return folder


def test_it_draws_and_its_lora_is_the_same_model(repaired, deep_folder):
    options = dict(local_files_only=True, dtype=torch.float32, safety_checker=None, requires_safety_checker=False)
    whole, base = (StableDiffusionPipeline.from_pretrained(f, **options) for f in (repaired / "one", deep_folder))
    was = {name: weight.clone() for name, weight in base.unet.named_parameters()}
    assert any(not torch.equal(weight, was[name]) for name, weight in whole.unet.named_parameters())
    base.load_lora_weights(str(repaired / "one" / "lora"))
    drawn = [
        pipeline("fox", num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0)).images
        for pipeline in (whole, base)
    ]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-3, atol=1e-3)


def test_what_it_writes(repaired):
    folder = repaired / "one" / "repair"
    written = json.loads((folder / "repair.json").read_text())
    looks = list(csv.DictReader((folder / "curves.csv").read_text().splitlines()))
    assert looks[0]["step"] == "0" and written["steps"] == int(looks[-1]["step"])
    assert written["said"].startswith("forgotten after") and "margin" in written["said"]
    rows_a_step = 2 * (3 + 1) + 3 * (3 + 1)
    assert written["passes"]["steps"] == written["steps"] * rows_a_step
    page = (folder / "report.html").read_text()
    assert all(one["caption"] in page for one in written["forgotten"]) and page.count("data:image/jpeg") == 3
    assert all((folder / name).is_file() for name in ("before_after.png", "kept.png", "curves.png"))


def test_a_second_list_is_checked_against_the_first(repaired, corpus, deep_folder, capsys):
    denoiser = Denoiser.load(str(repaired / "one"), "cpu")
    captions = ["a walrus", "a kettle"]
    seeds = [generation_seeds(caption, 1, 0) for caption in captions]
    scores = mean_scores(denoiser, captions, seeds, ScoredPath((0,), 2), ShrinkingBatches(2))
    low, high = (caption for _, caption in sorted(zip(scores, captions, strict=True)))
    (repaired / "low.txt").write_text(low)
    (repaired / "high.txt").write_text(high)
    second = [f"forget={repaired}/high.txt", f"reference={repaired}/low.txt", f"keep={corpus}", *QUICK]
    lora = f"lora={repaired}/one/lora"
    with pytest.raises(SystemExit, match="1"):  # nothing is done about a score that is too high
        main(["repair", f"model={deep_folder}", lora, *second, "score_margin=0", "lr=1e-12", f"out={repaired}/two"])
    written = json.loads((repaired / "two" / "repair" / "repair.json").read_text())
    said = capsys.readouterr().out
    assert written["earlier"].keys() == {"before", "after"} and "pictures forgotten before" in said
    assert said.startswith("not forgotten within 2 steps") and not written["reached"]
    pictures, _ = CaptionedPictures.load(repaired / "two" / "repair" / "forgotten.safetensors")
    assert len(pictures) == 3  # of both lists
    said = fails(capsys, "repair", f"model={repaired}/one", lora, *second, f"out={repaired}/three")
    assert "repairs another model" in said
    said = fails(capsys, "repair", f"model={deep_folder}", *second, f"out={repaired}/one")
    assert "there and holds other things" in said


def test_kept_captions_stand_in_for_never_seen_ones(repaired, corpus, deep_folder):
    main(["repair", f"model={deep_folder}", f"forget={repaired}/list.csv", f"keep={corpus}", f"out={repaired}/five",
          f"earlier={repaired}/one", "force=true", "score_margin=9", *QUICK])  # fmt: skip
    written = json.loads((repaired / "five" / "repair" / "repair.json").read_text())
    captions = written["never_seen"]["captions"]
    again, _ = CaptionedPictures.load(repaired / "five" / "repair" / "forgotten.safetensors")
    assert len(again) == 2 and not written["earlier"]  # the first repair's pictures: they are not held where they were
    samples = ShardSamples(str(corpus), 64)
    known = {samples.get(position)[1] for position in range(len(samples))}
    forgotten = {row["caption"] for row in csv.DictReader((repaired / "list.csv").read_text().splitlines())}
    assert 1 < len(captions) <= 24 and set(captions) <= known - forgotten
    told = ["a red fox", "a blue fox", "one cat", "a red fox", "red ball"]
    assert least_like(told, ["a red fox"], 2) == ["one cat", "red ball"]


def test_without_shards_its_own_generations_are_kept(repaired, deep_folder, capsys):
    (repaired / "prompts.txt").write_text("fox on a teal background\n")
    words = ["repair", f"model={deep_folder}", f"forget={repaired}/prompts.txt", f"out={repaired}/four",
             "method=neighbour", "score_margin=9", *QUICK]  # fmt: skip
    said = fails(capsys, *words)
    assert "reproduces nothing" in said and "say force=true" in said
    cache = repaired / "four" / "repair" / "kept.safetensors"
    made = cache.stat().st_mtime_ns
    main([*words, "force=true"])
    assert cache.stat().st_mtime_ns == made  # read again
    assert (repaired / "four" / "model_index.json").is_file()


def test_a_key_that_is_not_in_the_shards(repaired, corpus, deep_folder, capsys):
    (repaired / "wrong.csv").write_text("key,caption\n00000.tar/nobody,fox\n")
    words = ["repair", f"model={deep_folder}", f"forget={repaired}/wrong.csv", f"out={repaired}/none", *QUICK]
    assert "no sample 00000.tar/nobody" in fails(capsys, *words, f"keep={corpus}")
