"""The verdict in words: how much looks memorized, what exclusion changed, what it cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from memtrain.report.copies import half_in_words
from memtrain.report.ledger import LedgerView
from memtrain.report.run import Run

PLANTED = ("canary", "sacrificed")


@dataclass(frozen=True)
class Sentence:
    """A sentence of the verdict."""

    text: str
    tone: str = "plain"  # good, bad, or plain: how the page marks it


def baseline_of(runs: list[Run]) -> Run | None:
    """What the others are compared with: the first run without rule and method, else the first run."""
    if len(runs) < 2:
        return None
    return next((run for run in runs if run.unprotected), runs[0])


def verdict(run: Run, baseline: Run | None) -> list[Sentence]:
    """Sentences about one run. `baseline`: another run that it is compared with."""
    compared = baseline if baseline is not run else None
    found = [
        _state(run),
        *_memorized(run),
        _copies(run, compared),
        _cut(run),
        *_doses(run),
        _sacrificed(run),
        _since(run),
        *_exclusion(run, compared),
        _cost(run, compared),
    ]
    return [sentence for sentence in found if sentence is not None]


def _state(run: Run) -> Sentence | None:
    """That the run is not finished, where it is not."""
    if run.finished:
        return None
    last = run.config.get("trainer", {}).get("max_steps")
    of = f" of {last}" if last else ""
    return Sentence(
        f"Not finished: at step {run.step}{of}, still going on or broken off. Copies are counted at the end."
    )


def _memorized(run: Run) -> list[Sentence]:
    """How many ordinary pictures look memorized, with what chance alone would give, and how many canaries.

    Duplicates are one picture.
    """
    view = run.ledger
    if view is None:
        return [Sentence("How many pictures look memorized is not known: there is no ledger.")]
    ordinary, planted = view.memorized("train"), view.memorized(*PLANTED)
    if ordinary is None or planted is None:
        return [Sentence("How many pictures look memorized is not known: see the remarks below.")]
    sentences = []
    judged, of_samples = len(view.of("train")), _of_samples(view, "train")
    if judged:
        chance = judged * view.false_positive_rate
        # the cut lies at one of the reference set's own samples, and strays as that one does: a beta-binomial
        rank = view.false_positive_rate * (view.judged.compared_with + 1)
        some = len(ordinary) > chance + 2 * math.sqrt(chance + chance**2 / rank)
        sentences.append(
            Sentence(
                f"{len(ordinary)} of {judged} ordinary training pictures{of_samples} look memorized by their score; "
                f"chance alone would give about {chance:.0f}"
                + (", so some are." if some else ", and could give as many."),
                "bad" if some else "plain",
            )
        )
    canaries = len(view.of(*PLANTED))
    if canaries:
        tone = "bad" if 2 * len(planted) > canaries else "plain"
        of_samples = _of_samples(view, *PLANTED)
        text = f"{len(planted)} of {canaries} canaries{of_samples} look memorized by their score."
        sentences.append(Sentence(text, tone))
    return sentences


def _of_samples(view: LedgerView, *groups: str) -> str:
    """How many samples a group's pictures are, where some have duplicates."""
    pictures, samples = len(view.of(*groups)), sum(view.of(*groups)["samples"].to_pylist())
    return f" ({samples} samples)" if samples > pictures else ""


def _copies(run: Run, baseline: Run | None) -> Sentence | None:
    """How many generations from canaries' captions are copies."""
    rate, chance = run.copy_rate("canary"), run.copy_rate("reference")
    if rate is None:
        return None
    own = run.copies.get("own", {}).get("canary", {})
    interval = f" (95 % over canaries: {own['low']:.1%} to {own['high']:.1%})" if own.get("low") is not None else ""
    text = f"{rate:.1%}{interval} of the generations from canaries' captions copy the training image"
    if run.copies:
        nearest = run.copies["nearest"]
        others = [
            f"{nearest[group]['rate']:.1%} {of}"
            for group, of in (("canary", "of them"), ("reference", "of those from captions that were never trained on"))
            if group in nearest
        ]
        text += f"; {' and '.join(others)} copy some training picture"
    elif chance is not None:
        text += f" ({chance:.1%} from captions that were never trained on)"
    before = baseline.copy_rate("canary") if baseline else None
    if before is None:
        return Sentence(f"{text}.", "bad" if rate > max(0.1, 3 * (chance or 0)) else "plain")
    return Sentence(f"{text}, against {before:.1%} in {baseline.name}.", "good" if rate < before else "bad")


def _cut(run: Run) -> Sentence | None:
    """What a copy is, and what set it."""
    if not run.copies:
        return None
    pictures = run.copies["training_pictures"]
    searched = "all" if pictures["searched"] == pictures["all"] else f"{pictures['searched']} of the {pictures['all']}"
    return Sentence(
        f"A copy lies within an RMSE of {run.copies['cut']:.3g}: {run.copies['cut_is']}. "
        f"The nearest was searched among {searched} training pictures."
    )


def _doses(run: Run) -> list[Sentence]:
    """From how many repeats on half of a canary's generations are copies, where canaries have several doses."""
    return [
        Sentence(f"Repeats and copies, {name} canaries: {half_in_words(curve)}.")
        for name, curve in run.doses.items()
        if len(curve.repeats) > 1
    ]


def _sacrificed(run: Run) -> Sentence | None:
    """How often the exported model draws the sacrificed canaries, which are never excluded."""
    rate = run.copy_rate("sacrificed")
    if rate is None:
        return None
    count = run.summary.get("canaries", {}).get("sacrificed", {}).get("pictures")
    which = "sacrificed canaries" if count is None else f"{count} sacrificed canar{'y' if count == 1 else 'ies'}"
    said = (
        f"The exported model draws the {which}, which no rule may exclude: {rate:.1%} of the generations from "
        "their captions copy the training image."
    )
    if run.config.get("canaries", {}).get("source") == "foreign":
        return Sentence(f"{said} They are foreign pictures, none of the corpus.")
    return Sentence(
        f"{said} canaries.sacrificed_keys names which pictures these are; canaries.source=foreign sacrifices none of "
        "the corpus.",
        "bad" if rate > 0 else "plain",
    )


def _since(run: Run) -> Sentence | None:
    """How many canaries came to be copied, and when the first did."""
    looked = run.memorized_at
    steps = sorted(step for step in looked.values() if step is not None)
    if not looked:
        return None
    if not steps:
        return Sentence(f"None of {len(looked)} canaries was ever copied by half of its generations.", "good")
    return Sentence(
        f"{len(steps)} of {len(looked)} canaries came to be copied by half of their generations, "
        f"the first by step {steps[0]}."
    )


def _exclusion(run: Run, baseline: Run | None) -> list[Sentence]:
    """What the rule excluded of each group."""
    canary, train, reference = (run.excluded(group) for group in ("canary", "train", "reference"))
    if run.rule == "none":
        return [Sentence("Nothing was excluded (exclusion=none).")]
    if canary is None and train is None:
        return [Sentence(f"{run.rule}: what it excluded was not recorded.")]
    shares = [
        (canary, "of the canaries' visits"), (train, "of the other training samples'"),
        (reference, "of the reference set's, had it been trained on"),
    ]  # fmt: skip
    said = ", ".join(f"{share:.1%} {whose}" for share, whose in shares if share is not None)
    over = "" if run.finished else " at the newest point"
    sentences = [Sentence(f"{run.rule} excluded{over} {said}.", "bad" if (train or 0) > 0.2 else "plain")]
    skipped = run.summary.get("updates_skipped") or 0
    if skipped:
        sentences.append(Sentence(f"{skipped} updates were skipped, since no sample of theirs was kept.", "bad"))
    return sentences


def _cost(run: Run, baseline: Run | None) -> Sentence | None:
    """What became of the held-out loss, against the run's start and the baseline."""
    loss, start = run.last("heldout_loss"), run.first("heldout_loss")
    if loss is None or start is None:
        return None
    text = f"Held-out loss {loss:.4f}, {change(loss, start)} than at the run's start ({start:.4f})"
    if len(run.curves["heldout_loss"][0]) == 1:
        text = f"Held-out loss {loss:.4f} so far"
    other = baseline.last("heldout_loss") if baseline else None
    if other is None:
        return Sentence(f"{text}.")
    return Sentence(
        f"{text}, {change(loss, other)} than in {baseline.name} ({other:.4f}).",
        "bad" if loss > 1.02 * other else "good",
    )


def change(value: float, before: float) -> str:
    """A difference in words that go before `than`: `3.1 % higher`."""
    share = value / before - 1 if before else 0.0
    return "not higher" if abs(share) < 5e-4 else f"{abs(share):.1%} {'higher' if share > 0 else 'lower'}"
