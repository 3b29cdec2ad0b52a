"""Planned rows to a ``Batch``: reads, encodes, decodes. Keeps no state, so it can run anywhere."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from data_pipeline.batch import IMAGE_ID_BITS, PADDING, Batch
from data_pipeline.decode import crop, decode
from data_pipeline.errors import BadSample
from data_pipeline.formats import Document, parse_content, read_range
from data_pipeline.index import IMAGE, Corpus
from data_pipeline.plan import Part, sample_id
from data_pipeline.quarantine import Failure
from data_pipeline.rows import describe_stream
from data_pipeline.settings import DataSettings
from data_pipeline.tokens import Tokenizer


@dataclass
class Slot:
    """One part of a document in a row: its tokens and image files.

    ``length`` tokens are its place in the row, whatever becomes of it; ``sample`` and ``source`` as
    in ``Batch``; ``first_image`` images of the document come before it; ``failure`` masks it.
    """

    length: int
    source: int
    sample: int
    first_image: int
    pair: bool
    tokens: list[int] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)
    failure: BadSample | None = None

    @classmethod
    def padding(cls, length: int) -> Slot:
        """The fill behind a row's last document."""
        return cls(length, PADDING, PADDING, 0, False)


class Producer:
    """Makes batches of planned rows.

    Args:
        settings: sizes and limits.
        corpus: the index the plan was made from.
        tokenizer: the one the index was made with.
    """

    def __init__(self, settings: DataSettings, corpus: Corpus, tokenizer: Tokenizer):
        self.settings = settings
        self.corpus = corpus
        self.tokenizer = tokenizer

    def produce(self, rows: list[list[Part]]) -> tuple[Batch, list[Failure], Counter]:
        """Make the batch of some rows.

        A sample that cannot be used is masked: its tokens become padding and its images are left
        out, nothing else moves.

        Returns:
            The batch, every row ``context_length`` long; the bad samples; and the number of samples
            looked at, by source.
        """
        planned = [(part, self._slot(part)) for row in rows for part in row]
        slots = iter(planned)
        laid = []
        for row in rows:
            filled = [next(slots)[1] for _ in row]
            rest = self.settings.context_length - sum(slot.length for slot in filled)
            laid.append(filled + ([Slot.padding(rest)] if rest else []))
        batch = self.assemble(laid)
        failures = [self._failure(part, slot.failure) for part, slot in planned if slot.failure]
        seen = Counter(self.corpus.sources[part.source].settings.name for part, _ in planned)
        return batch, failures, seen

    def assemble(self, rows: list[list[Slot]]) -> Batch:
        """Lay slots end to end and decode their images; a slot with a bad image is masked."""
        slots = [slot for row in rows for slot in row]
        row_starts = _offsets([sum(slot.length for slot in row) for row in rows])
        pair = np.repeat([slot.pair for slot in slots], [slot.length for slot in slots])
        first = describe_stream(self._tokens(slots), row_starts, self.tokenizer.special, pair_source=pair)
        pictures = self._pictures(slots, first.image_loss)
        tokens = self._tokens(slots)
        final = describe_stream(tokens, row_starts, self.tokenizer.special, pair_source=pair)
        cu_seqlens, source, samples = _documents(slots)
        size, drawn_size = self.settings.image_size, self.settings.drawn_size
        batch = Batch(
            tokens=tokens,
            labels=final.labels,
            row_starts=row_starts,
            cu_seqlens=cu_seqlens,
            source=source,
            sample_ids=samples,
            images=_stack([small for small, _, _ in pictures], size),
            image_ids=np.array([identity for _, _, identity in pictures], np.int64),
            drawn=_stack([large for _, large, _ in pictures if large is not None], drawn_size),
            drawn_index=np.flatnonzero(final.image_loss).astype(np.int32),
        )
        batch.validate()
        return batch

    def document(self, source: int, number: int) -> Document:
        """Read a document of the corpus as it stands in its shard.

        Raises:
            BadSample: when it cannot be read.
        """
        entry = self.corpus.sources[source].entries[number]
        shard = self.corpus.sources[source].shards[entry.shard]
        pieces, metadata = parse_content(read_range(shard, *entry.json))
        places = iter(entry.images)
        content: list[str | bytes] = [
            read_range(shard, *next(places)) if kind == "image" else value for kind, value in pieces
        ]
        return Document(entry.key, content, metadata)

    def slot_of(self, document: Document, source: int, sample: int, end: bool) -> Slot:
        """A whole document as a slot, with EOS where ``end`` says so."""
        special = self.tokenizer.special
        tokens = [special.bos]
        for piece in document.content:
            tokens += self._image_tokens() if isinstance(piece, bytes) else self.tokenizer.encode(piece)
        tokens += [special.eos] * end
        pair = 0 <= source < len(self.corpus.sources) and self._is_pair(source)
        return Slot(len(tokens), source, sample, 0, pair, tokens, document.images)

    def _slot(self, part: Part) -> Slot:
        sample = sample_id(part.source, part.number)
        slot = Slot(part.length, part.source, sample, part.first_image, self._is_pair(part.source))
        try:
            self._read(part, slot)
        except BadSample as failure:
            slot.failure = failure
        return slot

    def _read(self, part: Part, slot: Slot) -> None:
        """Read and encode a part; its images are read but not decoded."""
        source = self.corpus.sources[part.source]
        entry = source.entries[part.number]
        shard = source.shards[entry.shard]
        pieces, _ = parse_content(read_range(shard, *entry.json))
        places = iter(entry.images)
        where = [next(places, None) if kind == "image" else None for kind, _ in pieces]
        lengths = entry.pieces
        if part.flipped:
            pieces, where, lengths = pieces[::-1], where[::-1], lengths[::-1]
        if [kind == "image" for kind, _ in pieces] != [length == IMAGE for length in lengths]:
            raise BadSample("shard has changed", "the document's pieces are not those of its index")
        special = self.tokenizer.special
        tokens = [special.bos]
        for segment in part.segments:
            place = where[segment.piece]
            if place is not None:
                tokens += self._image_tokens()
                slot.images.append(read_range(shard, *place))
                continue
            own = self.tokenizer.encode(pieces[segment.piece][1])
            if len(own) != lengths[segment.piece]:
                expected = lengths[segment.piece]
                raise BadSample("shard has changed", f"{len(own)} tokens of text, {expected} in its index")
            tokens += own[segment.start : segment.stop]
        slot.tokens = tokens + [special.eos] * part.last

    def _pictures(self, slots: list[Slot], image_loss: np.ndarray) -> list[tuple]:
        """Input pixels, drawn pixels or None, and id of every image of the slots that stay good."""
        pictures, loss = [], iter(image_loss.tolist())
        for slot in slots:
            if slot.failure is not None:
                continue
            draws = [next(loss) for _ in slot.images]
            try:
                own = [self._picture(blob, draw) for blob, draw in zip(slot.images, draws, strict=True)]
            except BadSample as failure:
                slot.failure = failure
                continue
            first = slot.sample << IMAGE_ID_BITS | slot.first_image
            pictures += [(small, large, first + number) for number, (small, large) in enumerate(own)]
        return pictures

    def _picture(self, blob: bytes, draw: bool) -> tuple[np.ndarray, np.ndarray | None]:
        image = decode(blob, self.settings.max_pixels)
        small = crop(image, self.settings.image_size)
        return small, crop(image, self.settings.drawn_size) if draw else None

    def _tokens(self, slots: list[Slot]) -> np.ndarray:
        pad = self.tokenizer.special.pad
        good = [
            slot.tokens if slot.tokens and slot.failure is None else [pad] * slot.length for slot in slots
        ]
        return np.concatenate([np.array(tokens, np.int32) for tokens in good])

    def _image_tokens(self) -> list[int]:
        special = self.tokenizer.special
        return [special.boi] + [special.image] * self.settings.image_tokens

    def _is_pair(self, source: int) -> bool:
        return self.corpus.sources[source].settings.kind == "pairs"

    def _failure(self, part: Part, failure: BadSample) -> Failure:
        source = self.corpus.sources[part.source]
        entry = source.entries[part.number]
        shard = source.shards[entry.shard].name
        return Failure(source.settings.name, shard, entry.key, failure.reason, failure.detail)


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


def _stack(images: list[np.ndarray], size: int) -> np.ndarray:
    return np.stack(images) if images else np.empty((0, 3, size, size), np.uint8)
