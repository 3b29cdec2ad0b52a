"""Planned rows to a ``Batch``: reads and decodes their images. Keeps no state, so it can run anywhere."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.batch import IMAGE_ID_BITS, PADDING, Batch
from data_pipeline.decode import Decoder
from data_pipeline.errors import BadSample
from data_pipeline.quarantine import Failure
from data_pipeline.rows import predicted
from data_pipeline.settings import DataSettings
from data_pipeline.state import pixel_digest, row_checksums
from data_pipeline.storage import LocalFiles, Range, Storage, is_local
from data_pipeline.task import Produced, Task
from data_pipeline.tokens import Tokenizer
from data_pipeline.views import CENTER, View, view_of

Empty = Callable[[tuple[int, ...], Any], np.ndarray]
"""Makes an array of a shape and dtype whose values do not matter: ``numpy.empty``, or shared memory."""
Blob = bytes | Range | BadSample
"""Bytes of a file, or what is wrong with them; or where they lie on this machine: they are read when they
are needed, and are still in the CPU's cache when they are decoded."""


@dataclass(frozen=True)
class Pictures:
    """Pixels of a micro-batch's images and of its drawn images, the ids of the images, and the digests of
    both kinds."""

    images: np.ndarray
    drawn: np.ndarray
    ids: list[int]
    digests: tuple[list[int], list[int]]


class Producer:
    """Makes batches of planned rows.

    Args:
        settings: sizes and limits.
        tokenizer: the one the index was made with.
        empty: where the pixels are to lie.

    Raises:
        SettingsError: when ``data.decoder`` is not there.
    """

    def __init__(self, settings: DataSettings, tokenizer: Tokenizer, empty: Empty = np.empty):
        self.settings = settings
        self.tokenizer = tokenizer
        self.empty = empty
        self.decoder = Decoder(settings.decoder, settings.max_pixels)
        self.storage = Storage(settings.storage)
        kinds = [source.kind == "pairs" for source in settings.sources]
        self._pairs = np.array([*kinds, False])  # the last one for PADDING

    def produce(self, task: Task) -> Produced:
        """Make the batch of some rows.

        A sample that cannot be used is masked: its tokens become padding and its images are left
        out, nothing else moves.

        Returns:
            The batch, and what is to be known of it.
        """
        ranges = task.ranges()
        far = not all(map(is_local, {url for url, _ in task.shards}))
        blobs: Sequence[Blob] = self.storage.read_many(ranges) if far else ranges
        batch, digests, bad = self._assembled(task, blobs)
        checksums = row_checksums(batch, self.tokenizer.special.boi, digests)
        counts = np.bincount(task.source[task.source != PADDING])
        seen = {self.settings.sources[n].name: int(count) for n, count in enumerate(counts) if count}
        return Produced(batch, checksums, [self._failure(task, *found) for found in bad.items()], seen)

    def assemble(self, task: Task, blobs: Sequence[bytes]) -> tuple[Batch, dict[int, BadSample]]:
        """The batch of rows whose image files are given; and what is wrong with parts, by their number."""
        batch, _, bad = self._assembled(task, blobs)
        return batch, bad

    def _assembled(
        self, task: Task, blobs: Sequence[Blob]
    ) -> tuple[Batch, tuple[list[int], list[int]], dict[int, BadSample]]:
        """The batch, digests of its images and drawn images, and what is wrong with parts."""
        labels, image_loss = self._predicted(task.tokens, task)
        pictures, bad = self._pictures(task, blobs, image_loss.tolist())
        tokens, cu_seqlens, source, samples = _masked(task, bad, self.tokenizer.special.pad)
        if bad:
            labels, image_loss = self._predicted(tokens, task)
        batch = Batch(
            tokens=tokens,
            labels=labels,
            row_starts=task.row_starts,
            cu_seqlens=cu_seqlens,
            source=source,
            sample_ids=samples,
            images=pictures.images,
            image_ids=np.array(pictures.ids, np.int64),
            drawn=pictures.drawn,
            drawn_index=np.flatnonzero(image_loss).astype(np.int32),
        )
        batch.validate()
        return batch, pictures.digests, bad

    def _predicted(self, tokens: np.ndarray, task: Task) -> tuple[np.ndarray, np.ndarray]:
        pair = self._pairs[task.source].repeat(np.diff(task.cu_seqlens))
        return predicted(tokens, task.row_starts, self.tokenizer.special, pair_source=pair)

    def _pictures(
        self, task: Task, blobs: Sequence[Blob], loss: list[bool]
    ) -> tuple[Pictures, dict[int, BadSample]]:
        """Decode the images of the parts that are good; those of a part with a bad one are left out."""
        size, drawn_size = self.settings.image_size, self.settings.drawn_size
        images = self.empty((len(loss), size, size, 3), np.uint8)
        drawn = self.empty((sum(loss), drawn_size, drawn_size, 3), np.uint8)
        ids: list[int] = []
        digests: tuple[list[int], list[int]] = [], []
        bad: dict[int, BadSample] = {}
        at = 0
        decode = self.decoder.squares
        with LocalFiles() as files:
            for part, places in enumerate(task.images):
                first, large = map(len, digests)
                try:
                    for number, index in enumerate(range(at, at + len(places))):
                        blob = blobs[index]
                        if isinstance(blob, Range):
                            blob = files.read(blob)
                        if isinstance(blob, BadSample):
                            raise blob
                        out = [images[len(digests[0])]]
                        if loss[index]:
                            out.append(drawn[len(digests[1])])
                        decode(blob, out, self._view(task, part, number))
                        for square, known in zip(out, digests, strict=False):
                            known.append(pixel_digest(square))  # while it is in the CPU's cache
                    identity = int(task.sample_ids[part]) << IMAGE_ID_BITS | task.first_image[part]
                    ids += range(identity, identity + len(places))
                except BadSample as failure:
                    bad[part] = failure
                    del digests[0][first:], digests[1][large:]
                at += len(places)
        return Pictures(images[: len(ids)], drawn[: len(digests[1])], ids, digests), bad

    def _view(self, task: Task, part: int, number: int) -> View:
        """What is taken of an image of a part."""
        if task.views[part] is None:
            return CENTER
        source = self.settings.sources[task.source[part]]
        return view_of(source, task.views[part], task.first_image[part] + number)

    def _failure(self, task: Task, part: int, bad: BadSample) -> Failure:
        """The ledger's line of a bad part."""
        shard = task.shards[part][0].rpartition("/")[2]
        name = self.settings.sources[task.source[part]].name
        return Failure(name, shard, task.keys[part], bad.reason, bad.detail)


def _masked(task: Task, bad: Collection[int], pad: int) -> tuple[np.ndarray, ...]:
    """tokens, cu_seqlens, source and sample_ids with some parts turned into padding, which counts as one with
    the padding beside it in its row."""
    if not bad:
        return task.tokens, task.cu_seqlens, task.source, task.sample_ids
    tokens, source, samples = task.tokens.copy(), task.source.copy(), task.sample_ids.copy()
    for part in bad:
        tokens[task.cu_seqlens[part] : task.cu_seqlens[part + 1]] = pad
        source[part] = samples[part] = PADDING
    kept = np.ones(len(source), bool)
    kept[1:] = (source[1:] != PADDING) | (source[:-1] != PADDING)
    kept |= np.isin(task.cu_seqlens[:-1], task.row_starts)
    cu_seqlens = np.append(task.cu_seqlens[:-1][kept], task.cu_seqlens[-1:])
    return tokens, cu_seqlens, source[kept], samples[kept]
