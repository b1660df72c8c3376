"""Which words of a prompt make the score: significance of tokens and words, and what dropping a word does.

Shapes: R rows (a row is one generation), S chosen steps, L tokens, E width of a token embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from memtrain.audit.batches import ShrinkingBatches
from memtrain.audit.denoiser import Denoiser, generation_seeds
from memtrain.audit.explain.words import neighbours, replaced, without, words_of
from memtrain.audit.scored_path import FIRST_STEPS, ScoredPath, mean_scores
from memtrain.core.streams import Stream
from memtrain.models.samplers import Predictions

_ALTERNATIVES = 3  # replacements that are tried for a word


@dataclass(frozen=True)
class Token:
    text: str
    position: int  # in the padded prompt
    significance: float


@dataclass(frozen=True)
class WordSignificance:
    text: str
    start: int  # in the prompt, characters
    end: int
    significance: float | None  # None: beyond the tokenizer's length, the model never sees it


@dataclass(frozen=True)
class Edit:
    """A prompt with one word dropped or replaced, and the score it has then, from the same noise."""

    prompt: str
    word: str
    replacement: str | None  # None: dropped
    score: float


@dataclass(frozen=True)
class Explanation:
    prompt: str
    score: float  # d, mean over steps and generations
    tokens: list[Token]  # without BOS, EOS and padding
    words: list[WordSignificance]
    edits: list[Edit] = field(default_factory=list)  # lowest score first; where suggestions were asked for

    def ranked(self) -> list[WordSignificance]:
        """The words that the model sees, most significant first."""
        seen = [word for word in self.words if word.significance is not None]
        return sorted(seen, key=lambda word: -word.significance)


def explain(
    pipeline: DiffusionPipeline | Denoiser,
    prompts: str | Sequence[str],
    *,
    num_images_per_prompt: int = 4,
    steps: Sequence[int] = FIRST_STEPS,
    num_inference_steps: int = 50,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    suggest: int = 0,
    progress: Callable[[Iterable, int], Iterable] = lambda items, total: items,
) -> Explanation | list[Explanation]:
    """Token significance ‖∂d/∂e_i‖₂, mean over chosen steps and generations (Wen et al. 2024, section 4.1).

    e_i is the embedding that the text encoder is given for token i, so a word's influence through the
    encoder's attention counts as its own. A word's significance is the norm over all of its tokens.

    Args:
        prompts: one prompt gives one explanation, a list gives a list.
        guidance_scale: of the path; None is 7.5, of Flux.1 3.5.
        suggest: drop and replace so many of the most significant words, and score each of these prompts.
        progress: wraps what is iterated over, `(items, total)`.

    Raises:
        ValueError: no generation, or a step that the schedule does not have.
    """
    if num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt must be >= 1, got {num_images_per_prompt}")
    if suggest < 0:
        raise ValueError(f"suggest must be >= 0 words, got {suggest}")
    denoiser = pipeline if isinstance(pipeline, Denoiser) else Denoiser.of(pipeline)
    path, batches = ScoredPath(tuple(steps), num_inference_steps, guidance_scale), ShrinkingBatches(batch_size)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    found = []
    for prompt in progress(texts, len(texts)):
        seeds = generation_seeds(prompt, num_images_per_prompt, seed)
        explanation = _explain_one(denoiser, prompt, seeds, path, batches)
        if suggest:
            explanation = replace(explanation, edits=_edits(denoiser, explanation, seeds, path, batches, suggest))
        found.append(explanation)
    return found[0] if isinstance(prompts, str) else found


def _explain_one(
    denoiser: Denoiser, prompt: str, seeds: list[int], path: ScoredPath, batches: ShrinkingBatches
) -> Explanation:
    parts = list(
        batches.over(
            len(seeds),
            lambda rows: token_gradients(denoiser, [prompt] * len(rows), [seeds[row] for row in rows], path),
        )
    )
    norms, scores = (torch.cat(column) for column in zip(*parts, strict=True))  # (R, S, L), (R, S)
    words = words_of(prompt, denoiser.model.caption_pieces(prompt))
    ids = denoiser.model.tokenize([prompt])[0].tolist()
    places = sorted({place for word in words for place in word.tokens})
    return Explanation(
        prompt=prompt,
        score=scores.mean().item(),
        tokens=[Token(_said(denoiser, ids[place]), place, norms[..., place].mean().item()) for place in places],
        words=[
            WordSignificance(
                word.text,
                word.start,
                word.end,
                norms[..., list(word.tokens)].norm(dim=-1).mean().item() if word.tokens else None,
            )
            for word in words
        ],
    )


def _edits(
    denoiser: Denoiser,
    explanation: Explanation,
    seeds: list[int],
    path: ScoredPath,
    batches: ShrinkingBatches,
    count: int,
) -> list[Edit]:
    """The prompt without each of its top words, and with others in their place; lowest score first."""
    prompt, (tokenizer, encoder) = explanation.prompt, denoiser.model.aligned_encoders[0]
    table = encoder.get_input_embeddings().weight.detach()
    tried: list[tuple[str, str, str | None]] = []
    for word in explanation.ranked()[:count]:
        tried.append((without(prompt, word), word.text, None))
        alternatives = neighbours(word.text, tokenizer, table, _ALTERNATIVES)
        for other in alternatives if word.text[0].isalpha() else ():  # a mark has no other word
            tried.append((replaced(prompt, word, other), word.text, other))
    scores = mean_scores(denoiser, [text for text, _, _ in tried], [seeds] * len(tried), path, batches)
    edits = [Edit(*what, score) for what, score in zip(tried, scores, strict=True)]
    return sorted(edits, key=lambda edit: edit.score)


@dataclass(frozen=True)
class WordCheck:
    """Does the most significant word matter more than the least? Three scores from the same noise."""

    prompt: str
    score: float  # not the explanation's, which is of other noise
    top: str
    bottom: str
    score_without_top: float
    score_without_bottom: float

    @property
    def holds(self) -> bool:
        """Dropping the top word lowers the score more than dropping the bottom one."""
        return self.score_without_top < min(self.score, self.score_without_bottom)


def check_words(
    pipeline: DiffusionPipeline | Denoiser,
    explanations: Sequence[Explanation],
    *,
    num_images_per_prompt: int = 4,
    steps: Sequence[int] = FIRST_STEPS,
    num_inference_steps: int = 50,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> list[WordCheck]:
    """Drop each prompt's top word, then its bottom word. Prompts of fewer than two words are left out.

    The noise is another than that which ranked the words, also where `seed` is the same: in its own noise a ranking
    by chance would hold too.
    """
    denoiser = pipeline if isinstance(pipeline, Denoiser) else Denoiser.of(pipeline)
    path, batches = ScoredPath(tuple(steps), num_inference_steps, guidance_scale), ShrinkingBatches(batch_size)
    usable = [found for found in explanations if len(found.ranked()) > 1]
    ends = [(found.ranked()[0], found.ranked()[-1]) for found in usable]
    texts = [
        text
        for found, (top, bottom) in zip(usable, ends, strict=True)
        for text in (found.prompt, without(found.prompt, top), without(found.prompt, bottom))
    ]
    seeds = [
        generation_seeds(found.prompt, num_images_per_prompt, seed, Stream.CHECK) for found in usable for _ in range(3)
    ]
    scores = mean_scores(denoiser, texts, seeds, path, batches)
    return [
        WordCheck(found.prompt, whole, top.text, bottom.text, without_top, without_bottom)
        for found, (top, bottom), whole, without_top, without_bottom in zip(
            usable, ends, scores[::3], scores[1::3], scores[2::3], strict=True
        )
    ]


def _said(denoiser: Denoiser, token: int) -> str:
    """A token's own spelling, also where it is but a piece of a character."""
    tokenizer = denoiser.model.caption_tokenizer
    text = tokenizer.decode([token]).strip()
    return text if text and "�" not in text else tokenizer.convert_ids_to_tokens(token)


def token_gradients(
    denoiser: Denoiser, prompts: list[str], seeds: list[int], path: ScoredPath
) -> tuple[Tensor, Tensor]:
    """‖∂d/∂e_i‖₂ (R, S, L) and d (R, S), on the CPU; how the path itself depends on e is not followed."""
    denoiser = denoiser.guided(path.guidance_scale)
    cond, null, norms, scores = denoiser.encode(prompts), denoiser.model.null(len(prompts)), [], []

    def predict(index: int, t: float, latents: Tensor) -> Predictions:
        if index not in path.steps:
            with torch.no_grad():
                return denoiser.predict_pair(latents, t, cond, null)
        embeds = denoiser.model.token_embeds(prompts).float().requires_grad_()
        with torch.enable_grad():
            pair = denoiser.predict_pair(latents, t, denoiser.model.encode_embeds(embeds, prompts), null)
            score = pair.magnitude  # (R,)
            (gradient,) = torch.autograd.grad(score.sum(), embeds)  # (R, L, E); rows do not mix
        norms.append(gradient.norm(dim=2).cpu())
        scores.append(score.detach().cpu())
        return pair.detach()

    with denoiser.frozen():
        for _ in path.sampling(denoiser, cond, seeds, predict):
            pass
    return torch.stack(norms, dim=1), torch.stack(scores, dim=1)
