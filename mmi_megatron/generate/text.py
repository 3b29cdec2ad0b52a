"""The next token: by sampling, or by beam search over a step function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

State = TypeVar("State")
Step = Callable[[list[State], list[int]], tuple[Tensor, list[State]]]
"""Reads one more token after each of n states: their logits [n, V], and the states after."""


@dataclass(frozen=True)
class TextOptions:
    """How text is chosen.

    Attributes:
        temperature: divides the logits before sampling; 0 takes the likeliest token.
        top_k: samples among the k likeliest tokens, 0 for all.
        top_p: samples among the likeliest tokens that hold this share of the probability.
        beams: above 1: beam search over each stretch of text, no sampling.
        length_penalty: a beam's score is its log-probability over its length to this power; 0 does
            not look at the length (VQA), 1 takes the mean.
        min_tokens: tokens before a stretch of text may end.
        max_tokens: tokens at most, the one that ends the text included.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    min_tokens: int = 0
    max_tokens: int = 256

    def __post_init__(self) -> None:
        good = {
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "beams": self.beams >= 1,
            "min_tokens": 0 <= self.min_tokens <= self.max_tokens,
            "max_tokens": self.max_tokens >= 1,
        }
        for name, fine in good.items():
            if not fine:
                raise ValueError(f"{name}: {getattr(self, name)} makes no sense; {_RANGES[name]}")


_RANGES = {
    "temperature": "0 for the likeliest token, or above",
    "top_k": "0 for all tokens, or above",
    "top_p": "above 0 and at most 1",
    "beams": "at least 1",
    "min_tokens": "between 0 and max_tokens",
    "max_tokens": "at least 1",
}


def next_token(logits: Tensor, options: TextOptions, generator: torch.Generator) -> int:
    """Choose a token.

    Args:
        logits: floating [V]; minus infinity where a token may not come.
        options: temperature, then ``top_k``, then ``top_p``.
        generator: of the CPU, so that a seed gives the same text on any device.
    """
    if options.temperature == 0:
        return int(logits.argmax())
    logits = logits.detach().cpu().double() / options.temperature
    ordered, order = logits.sort(descending=True, stable=True)
    if options.top_k:
        ordered = ordered[: options.top_k]
    share = ordered.softmax(-1)
    # The smallest head of the order that holds top_p; the likeliest token is always in it.
    kept = share.cumsum(-1) - share < options.top_p
    return int(order[torch.multinomial(share * kept, 1, generator=generator)])


@dataclass
class Text(Generic[State]):
    """A stretch of text.

    Attributes:
        tokens: its ids; the last one is a stop when it ``ended``, or else ``max_tokens`` was reached.
        score: what a beam search ranks it by; 0 for a sample.
        state: after all its tokens but the last.
    """

    tokens: list[int]
    ended: bool
    score: float
    state: State


def write(
    logits: Tensor,
    state: State,
    step: Step[State],
    stops: Collection[int],
    options: TextOptions,
    generator: torch.Generator,
) -> Text[State]:
    """Write on until a stop, by beam search or by sampling; the arguments are those of both."""
    if options.beams > 1:
        return beam_search(logits, state, step, stops, options)[0]
    tokens: list[int] = []
    while True:
        if len(tokens) < options.min_tokens:
            logits = _without(logits, stops)
        tokens.append(next_token(logits, options, generator))
        if tokens[-1] in stops or len(tokens) == options.max_tokens:
            return Text(tokens, tokens[-1] in stops, 0.0, state)
        (logits,), (state,) = step([state], tokens[-1:])


def beam_search(
    logits: Tensor, state: State, step: Step[State], stops: Collection[int], options: TextOptions
) -> list[Text[State]]:
    """Find likely texts.

    Of all continuations of the running beams by one token, the likeliest are looked at. A stop among
    the first ``beams`` of them ends a text; the first ``beams`` that do not end run on. The search is
    over when no running beam scores better than the worst of ``beams`` texts, taken as if it ended
    now: with a length penalty above 0 a heuristic, the one of transformers.

    Args:
        logits: [V] of the first token; minus infinity where a token may not come.
        state: what ``step`` reads on from; never changed by it.
        step: see ``Step``.
        stops: tokens that end a text.
        options: ``beams``, ``length_penalty``, ``min_tokens`` and ``max_tokens``.

    Returns:
        One to ``beams`` texts, the best first.
    """
    beams = options.beams
    running, found = [Text([], False, 0.0, state)], list[Text[State]]()
    logits = logits[None]
    for length in range(1, options.max_tokens + 1):
        totals = logits.double().log_softmax(-1)
        if length <= options.min_tokens:
            totals = _without(totals, stops)
        totals = totals + totals.new_tensor([beam.score for beam in running])[:, None]
        going: list[Text[State]] = []
        for rank, (score, beam, token) in enumerate(_likeliest(totals, running, (len(stops) + 1) * beams)):
            longer = Text(beam.tokens + [token], token in stops, score, beam.state)
            if rank < beams and (longer.ended or length == options.max_tokens):
                found.append(replace(longer, score=score / length**options.length_penalty))
            if not longer.ended and len(going) < beams:
                going.append(longer)
        found = sorted(found, key=lambda text: -text.score)[:beams]
        best = going[0].score / length**options.length_penalty if going else -torch.inf
        if length == options.max_tokens or (len(found) == beams and best <= found[-1].score) or not going:
            break
        logits, states = step([beam.state for beam in going], [beam.tokens[-1] for beam in going])
        running = [replace(beam, state=after) for beam, after in zip(going, states, strict=True)]
    return found


def _likeliest(
    totals: Tensor, running: list[Text[State]], count: int
) -> Iterator[tuple[float, Text[State], int]]:
    """The ``count`` best continuations: score, beam and token."""
    scores, places = totals.flatten().topk(min(count, totals.numel()))
    for score, place in zip(scores.tolist(), places.tolist(), strict=True):
        if score > -torch.inf:
            yield score, running[place // totals.shape[1]], place % totals.shape[1]


def _without(logits: Tensor, tokens: Collection[int]) -> Tensor:
    return logits.index_fill(-1, torch.tensor(sorted(tokens), device=logits.device), -torch.inf)
