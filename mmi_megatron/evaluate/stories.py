"""How well a model tells picture stories: losses on held-out ones, whether it uses what came before,
and whether the pictures it draws show what the text says.

Every figure that needs a comparison gets it on the same documents, noise and timesteps: losses with
the context or the images of another story in place of the right ones, and drawn pictures judged
against another story's truth.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from data_pipeline.batch import IGNORED, Batch
from data_pipeline.errors import DataError
from data_pipeline.formats import Document
from data_pipeline.storybook import CHANCE, read_picture
from data_pipeline.stream import Stream
from mmi_megatron.model.mm_interleaved import MMInterleaved, prepare
from mmi_megatron.train.rng import keyed_seed

CHUNK = 10
"""Stories read together; swaps are made among them."""


@dataclass(frozen=True)
class Options:
    """What is evaluated.

    Attributes:
        documents: held-out stories, at least 2.
        steps, guidance: of drawn pictures.
        seed: of the noise, the timesteps and the pictures.
    """

    documents: int = 50
    steps: int = 20
    guidance: float = 2.0
    seed: int = 0


@torch.no_grad()
def judge_stories(model: MMInterleaved, stream: Stream, options: Options) -> dict[str, Any]:
    """Evaluate a model on held-out stories (collective where its language model is sharded).

    Args:
        model: around the plain or the sharded language model.
        stream: of the ``heldout`` split, its first source a storybook.
        options: how many, and how they are drawn.

    Returns:
        ``documents``, ``images``, ``tokens`` (predicted), ``seed``, ``steps``, ``guidance``; the mean
        ``next_token_loss`` and ``next_token_loss_images_swapped``; and, where the model draws, the
        mean ``next_image_loss`` and ``next_image_loss_contexts_swapped``, and ``agreement``: for
        colour, kind and position the share of drawn pictures that show what the story says
        (``accuracy`` of ``n``), by ``chance``, when judged by another story's truth
        (``other_story``), and of the true pictures (``true_pictures``).

    Raises:
        DataError: when there are fewer than two held-out stories, or a document is none.
    """
    documents = stream.heldout_documents(options.documents)
    _check(documents)
    model.eval()
    decoder = model.image_decoder
    totals: dict[str, float] = {}
    judged: list[dict[str, tuple[bool, bool, bool]]] = []
    chunks = np.array_split(np.arange(len(documents)), -(-len(documents) // CHUNK))
    with decoder.averaged() if decoder is not None else contextlib.nullcontext():
        for chunk in chunks:
            stories = [documents[index] for index in chunk]
            swap = Swap(stream.row_of(stories), stream)
            for name, value in _losses(model, swap, options.seed).items():
                totals[name] = totals.get(name, 0.0) + value
            if decoder is not None:
                judged += _judge_pictures(model, swap, stories, options)
    return _summary(documents, totals, judged, options)


class Swap:
    """A batch of documents, and for every image its partner: the image of the same number (or the
    last) in the next document."""

    def __init__(self, batch: Batch, stream: Stream):
        self.batch = batch
        special = stream.tokenizer.special
        bois = np.flatnonzero(batch.tokens == special.boi)
        document = np.searchsorted(batch.cu_seqlens, bois, "right") - 1
        owned = [np.flatnonzero(document == number) for number in range(len(batch.cu_seqlens) - 1)]
        self.number = np.concatenate([np.arange(len(own)) for own in owned])
        self.document = document
        following = [owned[(number + 1) % len(owned)] for number in range(len(owned))]
        self.partner = np.array(
            [following[d][min(n, len(following[d]) - 1)] for d, n in zip(document, self.number, strict=True)]
        )
        self.special = special


def _losses(model: MMInterleaved, swap: Swap, seed: int) -> dict[str, float]:
    """Sums over a batch."""
    batch, device = swap.batch, next(model.parameters()).device
    inputs = prepare(batch, swap.special, model.settings, device)
    losses = model(inputs, seed, 0)
    other = replace(inputs, images=inputs.images[torch.from_numpy(swap.partner).to(device)])
    hidden, _ = model.read(other)
    tokens = model.language_model.token_losses(hidden, inputs.labels)
    sums = {
        "tokens": int((batch.labels != IGNORED).sum()),
        "images": len(batch.drawn),
        "next_token": float(losses.tokens.double().sum()),
        "next_token_swapped": float(tokens.double().sum()),
    }
    if model.image_decoder is not None:
        place = {image: row for row, image in enumerate(batch.drawn_index.tolist())}
        order = [place[swap.partner[image]] for image in batch.drawn_index.tolist()]
        elsewhere = replace(
            inputs,
            contexts=[inputs.contexts[row] for row in order],
            references=inputs.references[torch.tensor(order, device=device)],
        )
        sums["next_image"] = float(losses.images.double().sum())
        sums["next_image_swapped"] = float(model(elsewhere, seed, 0).images.double().sum())
    return sums


def _judge_pictures(
    model: MMInterleaved, swap: Swap, stories: list[Document], options: Options
) -> list[dict[str, tuple[bool, bool, bool]]]:
    """Draw every picture of the batch. For each and every attribute: does the drawn picture show what
    its story says, what another story says, and does the true picture show what its story says?"""
    batch = swap.batch
    inputs = prepare(batch, swap.special, model.settings, next(model.parameters()).device)
    seeds = [keyed_seed(options.seed, 0, image, purpose="story picture") >> 1 for image in inputs.drawn_ids]
    drawn = model.draw(inputs, steps=options.steps, guidance=options.guidance, seeds=seeds)

    def truth(image: int) -> dict[str, str]:
        return stories[swap.document[image]].metadata["pages"][swap.number[image]]

    judged = []
    for picture, true, image in zip(drawn.cpu().numpy(), batch.drawn, batch.drawn_index, strict=True):
        seen, known = read_picture(picture), read_picture(true)
        own, other = truth(image), truth(swap.partner[image])
        judged.append(
            {
                name: (seen[name] == own[name], seen[name] == other[name], known[name] == own[name])
                for name in CHANCE
            }
        )
    return judged


def _summary(
    documents: list[Document], totals: dict[str, float], judged: list[dict], options: Options
) -> dict[str, Any]:
    tokens, images = int(totals["tokens"]), int(totals["images"])
    result: dict[str, Any] = {
        "documents": len(documents),
        "tokens": tokens,
        "images": images,
        "seed": options.seed,
        "steps": options.steps,
        "guidance": options.guidance,
        "next_token_loss": totals["next_token"] / tokens,
        "next_token_loss_images_swapped": totals["next_token_swapped"] / tokens,
    }
    if judged:
        result["next_image_loss"] = totals["next_image"] / images
        result["next_image_loss_contexts_swapped"] = totals["next_image_swapped"] / images
        shares = {name: np.mean([picture[name] for picture in judged], axis=0).tolist() for name in CHANCE}
        result["agreement"] = {
            name: {
                "accuracy": own,
                "chance": CHANCE[name],
                "other_story": other,
                "true_pictures": true,
                "n": len(judged),
            }
            for name, (own, other, true) in shares.items()
        }
    return result


def _check(documents: list[Document]) -> None:
    if len(documents) < 2:
        raise DataError(f"{len(documents)} held-out stories: at least 2 are needed; raise data.holdout")
    for document in documents:
        pages = document.metadata.get("pages")
        if not isinstance(pages, list) or len(pages) != len(document.images):
            raise DataError(
                f"document {document.key!r} is no story: its metadata lacks the truth of its pictures; "
                "make stories with `mmi data storybook`"
            )


def show(result: dict[str, Any], console: Console | None = None) -> None:
    """Print a result as two small tables."""
    console = console or Console()
    losses = Table("loss", "as it is", "swapped", "what is swapped", title=_title(result))
    for name, swapped in (("next_token", "images"), ("next_image", "contexts")):
        if f"{name}_loss" in result:
            losses.add_row(
                name.replace("_", "-"),
                f"{result[f'{name}_loss']:.4f}",
                f"{result[f'{name}_loss_{swapped}_swapped']:.4f}",
                f"{swapped}, with those of another story",
            )
    console.print(losses)
    if "agreement" not in result:
        return
    title = (
        f"{result['images']} drawn pictures, read by rule "
        f"({result['steps']} steps, guidance {result['guidance']:g}, seed {result['seed']})"
    )
    agreement = Table(
        "agrees with the text", "share", "by chance", "another story", "true pictures", title=title
    )
    for name, row in result["agreement"].items():
        shares = (row[key] for key in ("accuracy", "chance", "other_story", "true_pictures"))
        agreement.add_row(name, *(f"{share:.0%}" for share in shares))
    console.print(agreement)


def _title(result: dict[str, Any]) -> str:
    return f"{result['documents']} held-out stories ({result['tokens']:,} tokens predicted)"
