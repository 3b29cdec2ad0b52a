"""Batches from the data pipeline to the ranks that work on them.

Of each replica of the model one rank asks: the first of its first pipeline stage. It alone holds the
index and has anything decoded. What a batch says of itself (kilobytes) goes to all ranks of the replica;
the pixels of the input images only to the stage that encodes them, those of the drawn images only to the
stage that draws them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from data_pipeline.batch import IGNORED, PADDING, Batch
from data_pipeline.errors import TooManyFailures
from data_pipeline.feed import Division, Feed, Share, open_feed
from data_pipeline.quarantine import Failure, LedgerFile
from data_pipeline.rows import SpecialTokens
from mmi_megatron.config import Config, ModelConfig
from mmi_megatron.model.mm_interleaved import Inputs, planes, prepare
from mmi_megatron.platform import Upload, device, has_gpu

if TYPE_CHECKING:
    from data_pipeline.ray_service import RemoteFeed

PIXELS = ("images", "drawn")
"""The fields of a batch that not all ranks get."""


@dataclass(frozen=True)
class Delivered:
    """Micro-batches as a rank has them.

    Attributes:
        batches: the micro-batches; their pixels are in ``pixels``, here these have no size.
        pixels: of each, uint8 [I, h, w, 3] and [J, H, W, 3] on the device; no size where they are not
            this stage's.
        note: what the asking rank says with them, as JSON values.
    """

    batches: list[Batch]
    pixels: list[tuple[Tensor, Tensor]]
    note: dict[str, Any] = field(default_factory=dict)

    def inputs(self, special: SpecialTokens, config: ModelConfig) -> list[Inputs]:
        """The micro-batches as the model takes them."""
        return [
            replace(prepare(batch, special, config, device()), images=planes(images), drawn=planes(drawn))
            for batch, (images, drawn) in zip(self.batches, self.pixels, strict=True)
        ]


@dataclass(frozen=True)
class Place:
    """Where this rank stands in its replica.

    Attributes:
        peers: group of the ranks of its stage, tensor- and context-parallel.
        stages: group of the ranks with its place in their stages, the first stage's first.
        first, last: whether it is in the first and in the last stage.
    """

    peers: dist.ProcessGroup
    stages: dist.ProcessGroup
    first: bool
    last: bool

    @classmethod
    def here(cls) -> Place:
        """This rank's place in Megatron's groups."""
        peers = parallel_state.get_tensor_and_context_parallel_group()
        stages = parallel_state.get_pipeline_model_parallel_group()
        return cls(peers, stages, stages.rank() == 0, stages.rank() == stages.size() - 1)

    @property
    def asks(self) -> bool:
        """Whether this rank asks for the replica's batches."""
        return self.first and self.peers.rank() == 0

    def to_peers(self, data: Tensor) -> Tensor:
        """What the stage's first rank holds, on all its ranks (called by these)."""
        if self.peers.size() > 1 and data.numel():
            dist.broadcast(data, group=self.peers, group_src=0)
        return data

    def to_all(self, data: Tensor) -> Tensor:
        """What the asking rank holds, on all ranks of the replica (called by these)."""
        if self.first:
            self.to_peers(data)
        if self.stages.size() > 1:
            dist.broadcast(data, group=self.stages, group_src=0)
        return data


class Delivery:
    """The data of a run on this rank.

    Args:
        config: the run.
        dp_rank, dp_size: which of how many replicas. Process groups must be up.
        out: folder of the run; each replica's bad samples are named in ``out/quarantine`` (``LedgerFile``).

    Raises:
        DataError: on the rank that asks, when the data cannot be opened.
    """

    def __init__(self, config: Config, dp_rank: int, dp_size: int, out: Path | None = None):
        train = config.train
        self.config, self.dp_rank, self.dp_size = config, dp_rank, dp_size
        self.place = Place.here()
        self.feed: Feed | RemoteFeed | None = None
        self._state: dict[str, Any] = {}
        self._early: tuple[Share, list[Upload]] | None = None
        self.ledger = LedgerFile(out / "quarantine", f"replica_{dp_rank:04d}") if out else None
        if self.place.asks:
            count = train.rows // (dp_size * train.micro_rows)
            self.feed = open_feed(
                config.data, Division(dp_rank, dp_size, train.micro_rows, count), train.rows
            )
            self._state = self.feed.state()

    def next(self) -> Delivered:
        """The micro-batches of the next step; every rank of the replica must call it.

        Its ``note``: ``rows`` and ``checksums`` (numbers and checksums of its rows in the step),
        ``step_rows``, ``quarantined`` (bad samples so far), ``state`` (the position after it).
        """
        if self.feed is None:
            delivered = receive(self.place)
        else:
            share, uploads = self._early or self._take()
            self._early = None
            note = {
                "rows": share.rows,
                "checksums": share.checksums.tolist(),
                "step_rows": share.step_rows,
                "quarantined": share.quarantined,
                "state": share.state,
            }
            delivered = send(self.place, share.batches, note, uploads)
        self._state = delivered.note["state"]
        return delivered

    def ahead(self) -> None:
        """Start to copy the next step's pixels to the device, if they are made already.

        To be called while the device is busy with this step; where there is no GPU nothing happens.
        """
        if self._early is None and self.feed is not None and has_gpu() and self.feed.ready():
            self._early = self._take()

    def state(self) -> dict[str, Any]:
        """Position after the last step delivered, for a checkpoint; the same on all ranks of the replica."""
        return self._state

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ResumeError: on the rank that asks; see ``Stream.load_state``.
        """
        self._early, self._state = None, state
        if self.feed is not None:
            self.feed.load_state(state)

    def validation(self, source: str) -> Delivered:
        """This replica's part of the held-out documents of a source; called by every rank of it."""
        if self.feed is None:
            return receive(self.place)
        train = self.config.train
        batches = self.feed.validation_batches(
            source, train.validate_documents, train.micro_rows, self.dp_rank, self.dp_size
        )
        return send(self.place, batches)

    def heldout(self, documents: int, pad: int) -> Delivered:
        """Held-out documents of the first source as one batch, a row each; called by every rank. Under
        context or sequence parallelism ``pad`` tokens fill it up to what the ranks can divide."""
        if self.feed is None:
            return receive(self.place)
        parallel = self.config.parallel
        multiple = parallel.context * (parallel.tensor if parallel.sequence else 1)
        return send(self.place, [padded(self.feed.heldout(documents), multiple, pad)])

    def close(self) -> None:
        """End the workers."""
        if self.feed is not None:
            self.feed.close()

    def _take(self) -> tuple[Share, list[Upload]]:
        assert self.feed is not None
        try:
            share = self.feed.next()
        except TooManyFailures as error:
            self._note(self._state["cursor"]["step"], error.failures, {})
            raise
        self._note(share.number, share.failures, share.totals)
        return share, [Upload([batch.images, batch.drawn]) for batch in share.batches]

    def _note(self, step: int, failures: Sequence[Failure], totals: dict[str, dict[str, int]]) -> None:
        if self.ledger is not None:
            self.ledger.add(step, failures, totals)


def padded(batch: Batch, multiple: int, pad: int) -> Batch:
    """The batch with a row of padding at its end, if its tokens are no multiple of ``multiple``."""
    missing = -len(batch.tokens) % multiple
    if not missing:
        return batch
    total = np.int32(len(batch.tokens) + missing)
    return replace(
        batch,
        tokens=np.append(batch.tokens, np.full(missing, pad, np.int32)),
        labels=np.append(batch.labels, np.full(missing, IGNORED, np.int32)),
        row_starts=np.append(batch.row_starts, total),
        cu_seqlens=np.append(batch.cu_seqlens, total),
        source=np.append(batch.source, np.int32(PADDING)),
        sample_ids=np.append(batch.sample_ids, np.int64(PADDING)),
    )


def send(
    place: Place,
    batches: Sequence[Batch],
    note: dict[str, Any] | None = None,
    uploads: list[Upload] | None = None,
) -> Delivered:
    """Give micro-batches to this rank's replica (on the rank that asks; ``receive`` on all others).

    Args:
        place: this rank's.
        batches: the micro-batches, with all pixels.
        note: JSON values to go with them.
        uploads: of each, its images and its drawn images, if they are on their way already.
    """
    described = [
        {f.name: [getattr(batch, f.name).dtype.str, getattr(batch, f.name).shape] for f in fields(batch)}
        for batch in batches
    ]
    words = json.dumps({"batches": described, "note": note or {}}).encode()
    arrays = [getattr(batch, f.name) for batch in batches for f in fields(batch) if f.name not in PIXELS]
    body = b"".join([words, *(array.tobytes() for array in arrays)])
    place.to_all(torch.tensor([len(words), len(body)], device=device()))
    place.to_all(torch.frombuffer(bytearray(body), dtype=torch.uint8).to(device()))
    uploads = uploads or [Upload([batch.images, batch.drawn]) for batch in batches]
    pixels = []
    for upload in uploads:
        images, drawn = upload.tensors()
        pixels.append((_deliver_images(place, images), _deliver_drawn(place, drawn)))
    return Delivered([_without_pixels(batch) for batch in batches], pixels, note or {})


def receive(place: Place) -> Delivered:
    """Take the micro-batches that ``send`` gives."""
    head, total = place.to_all(torch.zeros(2, dtype=torch.long, device=device())).tolist()
    body = place.to_all(torch.empty(total, dtype=torch.uint8, device=device())).cpu().numpy()
    described = json.loads(body[:head].tobytes())
    at, batches, pixels = head, [], []
    for given in described["batches"]:
        arrays = {}
        for name, (dtype, shape) in given.items():
            if name in PIXELS:
                arrays[name] = np.empty((shape[0], 0, 0, 3), np.uint8)
                continue
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            arrays[name] = body[at : at + size].view(dtype).reshape(shape).copy()
            at += size
        batches.append(Batch(**arrays))
        empty = [_nothing(given[name][1]) for name in PIXELS]
        pixels.append((_deliver_images(place, empty[0]), _deliver_drawn(place, empty[1])))
    return Delivered(batches, pixels, described["note"])


def _deliver_images(place: Place, images: Tensor) -> Tensor:
    """Input images to all ranks of the first stage; without size elsewhere."""
    if not place.first:
        return images.new_empty(len(images), 0, 0, 3)
    return place.to_peers(images)


def _deliver_drawn(place: Place, drawn: Tensor) -> Tensor:
    """Drawn images to all ranks of the last stage; without size elsewhere."""
    if place.stages.size() > 1 and place.peers.rank() == 0 and drawn.numel():
        if place.first:
            dist.send(drawn, group=place.stages, group_dst=place.stages.size() - 1)
        if place.last:
            dist.recv(drawn, group=place.stages, group_src=0)
    return place.to_peers(drawn) if place.last else drawn.new_empty(len(drawn), 0, 0, 3)


def _nothing(shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=torch.uint8, device=device())


def _without_pixels(batch: Batch) -> Batch:
    images, drawn = (np.empty((len(getattr(batch, name)), 0, 0, 3), np.uint8) for name in PIXELS)
    return replace(batch, images=images, drawn=drawn)
