"""Planned rows to a ``Batch``: reads, encodes, decodes. Keeps no state, so it can run anywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipeline.batch import IMAGE_ID_BITS, PADDING, Batch
from data_pipeline.decode import Decoder
from data_pipeline.errors import BadSample
from data_pipeline.formats import Document, parse_content
from data_pipeline.index import IMAGE
from data_pipeline.plan import sample_id
from data_pipeline.quarantine import Failure
from data_pipeline.rows import describe_stream
from data_pipeline.settings import DataSettings
from data_pipeline.state import folded, pixel_words, row_checksums
from data_pipeline.storage import LocalFiles, Range, Storage, is_local
from data_pipeline.task import Address, Produced, Task
from data_pipeline.tokens import Tokenizer
from data_pipeline.views import CENTER, View, view_of

Empty = Callable[[tuple[int, ...], Any], np.ndarray]
"""Makes an array of a shape and dtype whose values do not matter: ``numpy.empty``, or shared memory."""
Blob = bytes | Range | BadSample
"""Bytes of a file, or what is wrong with them; or where they lie on this machine: they are read when they
are needed, and are still in the CPU's cache when they are decoded."""


@dataclass
class Slot:
    """One part of a document in a row: its tokens and image files.

    ``length`` tokens are its place in the row, whatever becomes of it; ``sample`` and ``source`` as
    in ``Batch``; ``first_image`` images of the document come before it; ``failure`` masks it; ``view`` as
    in ``Part``.
    """

    length: int
    source: int
    sample: int
    first_image: int
    pair: bool
    tokens: list[int] = field(default_factory=list)
    images: Sequence[Blob] = ()
    failure: BadSample | None = None
    view: int | None = None

    @classmethod
    def padding(cls, length: int) -> Slot:
        """The fill behind a row's last document."""
        return cls(length, PADDING, PADDING, 0, False)


class Squares:
    """Room for images of one size, and the ``pixel_sums`` of those that are in it.

    Attributes:
        pixels: uint8 [n, h, w, 3], to be written to.
    """

    def __init__(self, pixels: np.ndarray):
        self.pixels, self._words = pixels, pixel_words(pixels)
        self._sums = np.empty((len(pixels), self._words.shape[-1]), np.uint64)

    def add(self, number: int) -> None:
        """Add up an image that has been written, while it is in the CPU's cache."""
        np.add.reduce(self._words[number], 0, np.uint64, self._sums[number])

    def sums(self, count: int) -> np.ndarray:
        """``pixel_sums`` of the first images."""
        return folded(self._sums[:count], self.pixels.shape[1])


@dataclass(frozen=True)
class Pictures:
    """Pixels of a micro-batch's images and of its drawn images, the ids of the images, and the sums of
    both kinds of pixels."""

    images: np.ndarray
    drawn: np.ndarray
    ids: list[int]
    sums: tuple[np.ndarray, np.ndarray]


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

    def produce(self, task: Task) -> Produced:
        """Make the batch of some rows.

        A sample that cannot be used is masked: its tokens become padding and its images are left
        out, nothing else moves.

        Returns:
            The batch, every row ``context_length`` long, and what is to be known of it.
        """
        failures = []
        with LocalFiles() as files:
            laid = self._laid(task, files)
            batch, sums = self._assembled(laid, files)
        for row, slots in zip(task.rows, laid, strict=True):
            for address, slot in zip(row, slots, strict=False):
                if slot.failure is not None:
                    failures.append(failure_of(address, slot.failure))
        seen = Counter(address.source for row in task.rows for address in row)
        return Produced(batch, row_checksums(batch, self.tokenizer.special.boi, sums), failures, dict(seen))

    def assemble(self, rows: list[list[Slot]]) -> Batch:
        """Lay slots end to end and decode their images; a slot with a bad image is masked."""
        with LocalFiles() as files:
            return self._assembled(rows, files)[0]

    def _laid(self, task: Task, files: LocalFiles) -> list[list[Slot]]:
        """The slots of the rows. What is on other machines is read all at once."""
        wanted = [address.ranges() for row in task.rows for address in row]
        far = [place for places in wanted if not is_local(places[0].url) for place in places]
        found = iter(self.storage.read_many(far) if far else [])
        blobs = iter([p if is_local(p[0].url) else [next(found) for _ in p] for p in wanted])
        laid = []
        for row in task.rows:
            slots = [self._slot(address, next(blobs), files) for address in row]
            rest = self.settings.context_length - sum(slot.length for slot in slots)
            laid.append(slots + ([Slot.padding(rest)] if rest else []))
        return laid

    def _assembled(
        self, rows: list[list[Slot]], files: LocalFiles
    ) -> tuple[Batch, tuple[np.ndarray, np.ndarray]]:
        slots = [slot for row in rows for slot in row]
        row_starts = _offsets([sum(slot.length for slot in row) for row in rows])
        pair = np.repeat([slot.pair for slot in slots], [slot.length for slot in slots])
        tokens, special = self._tokens(slots), self.tokenizer.special
        described = describe_stream(tokens, row_starts, special, pair_source=pair)
        bad = _failures(slots)
        pictures = self._pictures(slots, described.image_loss, files)
        if _failures(slots) > bad:
            tokens = self._tokens(slots)
            described = describe_stream(tokens, row_starts, special, pair_source=pair)
        cu_seqlens, source, samples = _documents(slots)
        batch = Batch(
            tokens=tokens,
            labels=described.labels,
            row_starts=row_starts,
            cu_seqlens=cu_seqlens,
            source=source,
            sample_ids=samples,
            images=pictures.images,
            image_ids=np.array(pictures.ids, np.int64),
            drawn=pictures.drawn,
            drawn_index=np.flatnonzero(described.image_loss).astype(np.int32),
        )
        batch.validate()
        return batch, pictures.sums

    def document(self, address: Address) -> Document:
        """Read a document of the corpus as it stands in its shard.

        Raises:
            BadSample: when it cannot be read.
        """
        head, *images = (Range(address.shard, *p, address.etag) for p in (address.json, *address.images))
        pieces, metadata = parse_content(self.storage.read(head))
        places = iter(images)
        content: list[str | bytes] = [
            self.storage.read(next(places)) if kind == "image" else value for kind, value in pieces
        ]
        return Document(address.key, content, metadata)

    def slot_of(self, document: Document, source: int, pair: bool, sample: int, end: bool) -> Slot:
        """A whole document as a slot, with EOS where ``end`` says so."""
        special = self.tokenizer.special
        tokens = [special.bos]
        for piece in document.content:
            tokens += self._image_tokens() if isinstance(piece, bytes) else self.tokenizer.encode(piece)
        tokens += [special.eos] * end
        return Slot(len(tokens), source, sample, 0, pair, tokens, document.images)

    def _slot(self, address: Address, blobs: Sequence[Blob], files: LocalFiles) -> Slot:
        part = address.part
        sample = sample_id(part.source, part.number)
        slot = Slot(part.length, part.source, sample, part.first_image, address.pair, view=part.view)
        try:
            self._fill(address, slot, blobs, files)
        except BadSample as failure:
            slot.failure = failure
        return slot

    def _fill(self, address: Address, slot: Slot, blobs: Sequence[Blob], files: LocalFiles) -> None:
        """Encode a part's text; its images are not decoded."""
        part, lengths = address.part, address.pieces
        for blob in blobs:
            if isinstance(blob, BadSample):
                raise blob
        pieces, _ = parse_content(_read(blobs[0], files))
        if part.flipped:
            pieces, lengths = pieces[::-1], lengths[::-1]
        if [kind == "image" for kind, _ in pieces] != [length == IMAGE for length in lengths]:
            raise BadSample("shard has changed", "the document's pieces are not those of its index")
        special = self.tokenizer.special
        tokens = [special.bos]
        for segment in part.segments:
            kind, text = pieces[segment.piece]
            if kind == "image":
                tokens += self._image_tokens()
                continue
            own = self.tokenizer.encode(text)
            if len(own) != lengths[segment.piece]:
                expected = lengths[segment.piece]
                raise BadSample("shard has changed", f"{len(own)} tokens of text, {expected} in its index")
            tokens += own[segment.start : segment.stop]
        slot.images = blobs[1:]
        slot.tokens = tokens + [special.eos] * part.last

    def _pictures(self, slots: list[Slot], image_loss: np.ndarray, files: LocalFiles) -> Pictures:
        """Decode the images of the slots that are good; those of a slot with a bad one are left out."""
        size, drawn_size = self.settings.image_size, self.settings.drawn_size
        loss = image_loss.tolist()
        images = Squares(self.empty((len(loss), size, size, 3), np.uint8))
        drawn = Squares(self.empty((sum(loss), drawn_size, drawn_size, 3), np.uint8))
        ids: list[int] = []
        large = at = 0
        for slot in slots:
            if slot.failure is not None or not slot.images:
                continue
            draws = loss[at : at + len(slot.images)]
            at += len(slot.images)
            first, filled = len(ids), large
            try:
                for number, (blob, draw) in enumerate(zip(slot.images, draws, strict=True)):
                    out = [images.pixels[first + number]] + ([drawn.pixels[filled]] if draw else [])
                    self.decoder.squares(_read(blob, files), out, self._view(slot, number))
                    images.add(first + number)
                    if draw:
                        drawn.add(filled)
                        filled += 1
            except BadSample as failure:
                slot.failure = failure
                continue
            identity = slot.sample << IMAGE_ID_BITS | slot.first_image
            ids += range(identity, identity + len(slot.images))
            large = filled
        sums = images.sums(len(ids)), drawn.sums(large)
        return Pictures(images.pixels[: len(ids)], drawn.pixels[:large], ids, sums)

    def _view(self, slot: Slot, number: int) -> View:
        """What is taken of an image of a slot."""
        if slot.view is None:
            return CENTER
        return view_of(self.settings.sources[slot.source], slot.view, slot.first_image + number)

    def _tokens(self, slots: list[Slot]) -> np.ndarray:
        pad = self.tokenizer.special.pad
        good = [
            slot.tokens if slot.tokens and slot.failure is None else [pad] * slot.length for slot in slots
        ]
        return np.array([token for tokens in good for token in tokens], np.int32)

    def _image_tokens(self) -> list[int]:
        special = self.tokenizer.special
        return [special.boi] + [special.image] * self.settings.image_tokens


def _read(blob: Blob, files: LocalFiles) -> bytes:
    found = files.read(blob) if isinstance(blob, Range) else blob
    if isinstance(found, BadSample):
        raise found
    return found


def failure_of(address: Address, failure: BadSample) -> Failure:
    """The ledger's line of a bad sample."""
    shard = address.shard.rpartition("/")[2]
    return Failure(address.source, shard, address.key, failure.reason, failure.detail)


def _failures(slots: list[Slot]) -> int:
    return sum(slot.failure is not None for slot in slots)


def _documents(slots: list[Slot]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """cu_seqlens, source and sample ids; neighbouring padding and masked slots count as one."""
    lengths: list[int] = []
    sources: list[int] = []
    samples: list[int] = []
    for slot in slots:
        masked = slot.failure is not None or slot.source == PADDING
        if masked and sources and sources[-1] == PADDING:
            lengths[-1] += slot.length
            continue
        lengths.append(slot.length)
        sources.append(PADDING if masked else slot.source)
        samples.append(PADDING if masked else slot.sample)
    return _offsets(lengths), np.array(sources, np.int32), np.array(samples, np.int64)


def _offsets(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
