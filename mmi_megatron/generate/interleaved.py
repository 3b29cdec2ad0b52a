"""Documents written on by the model: text, and pictures wherever it asks for one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.decode import crop, decode
from data_pipeline.errors import BadSample, DataError
from data_pipeline.formats import Document
from data_pipeline.rows import RowDescription
from data_pipeline.storybook import to_png
from mmi_megatron.errors import ConfigError
from mmi_megatron.generate.load import Run
from mmi_megatron.generate.text import TextOptions, write
from mmi_megatron.model.language_model import Beams, Cache, Visibility
from mmi_megatron.model.mm_interleaved import describe, planes
from mmi_megatron.train.rng import keyed_seed

ENDED = "the model ended it"
ENOUGH_TEXT = "max_tokens reached"
ENOUGH_IMAGES = "max_images reached"
FULL = "context length reached"


@dataclass(frozen=True)
class Options:
    """How a document is written on.

    Attributes:
        text: how text is chosen; its ``max_tokens`` counts all new text of the document.
        max_images: pictures drawn at most; the document ends where the model asks for one more.
        picture_first: draw a picture right after the prompt, whether or not the model would.
        steps: denoising steps of a picture.
        guidance: weight of classifier-free guidance, 1 for none.
        scheduler: ``ddim`` or ``ddpm``.
        seed: of the text's samples and of every picture's noise.
    """

    text: TextOptions = field(default_factory=TextOptions)
    max_images: int = 4
    picture_first: bool = False
    steps: int = 50
    guidance: float = 3.5
    scheduler: str = "ddim"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_images", 0), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: must be at least {least}, got {getattr(self, name)}")
        if self.scheduler not in ("ddim", "ddpm"):
            raise ValueError(f"scheduler: must be ddim or ddpm, got {self.scheduler!r}")


@dataclass(frozen=True)
class Reading:
    """A document as far as it has been read.

    Attributes:
        tokens: its T tokens.
        hidden: states after the final norm, in pieces that make up [T, width].
        maps: [I, S, C] of its images.
        cache: of the language model.
        logits: float32 [vocabulary] of the token to come; minus infinity where none may be chosen.
    """

    tokens: list[int]
    hidden: list[Tensor]
    maps: Tensor
    cache: Cache
    logits: Tensor


class Reader:
    """Reads documents piece by piece with a cache; the states are those of reading them at once."""

    def __init__(self, run: Run):
        self.run, self.model = run, run.model
        self.special = run.tokenizer.special
        never = [self.special.bos, self.special.pad, self.special.image]
        if self.model.image_decoder is None:
            never.append(self.special.boi)
        self.never = torch.tensor(never, device=run.device)

    def start(self, document: Document) -> Reading:
        """Read BOS and the pieces of a document.

        Raises:
            DataError: when it says nothing, an image cannot be decoded, or it is too long.
        """
        tokens, pictures = [self.special.bos], []
        for number, piece in enumerate(document.content):
            if isinstance(piece, str):
                tokens += self.run.tokenizer.encode(piece)
                continue
            tokens += [self.special.boi] + self._placeholders()
            try:
                image = decode(piece, self.run.config.data.max_pixels)
            except BadSample as bad:
                raise DataError(f"document {document.key!r}, content[{number}]: {bad}") from None
            pictures.append(crop(image, self.run.config.model.vision.image_size))
        room = self.run.config.data.context_length
        if len(tokens) == 1:
            raise DataError(f"document {document.key!r}: empty; give it some text or an image")
        if len(tokens) >= room:
            raise DataError(
                f"document {document.key!r}: {len(tokens)} tokens, and the model's context "
                f"(data.context_length) is {room}; shorten it"
            )
        vision = self.run.config.model.vision
        positions = sum(height * width for height, width in self.model.visual_tokenizer.shapes)
        like = next(self.model.visual_tokenizer.parameters())
        maps = like.new_zeros(0, positions, vision.width)
        nothing = Reading([], [], maps, Cache(), torch.zeros(0, device=self.run.device))
        return self.read(nothing, tokens, np.stack(pictures) if pictures else None)

    @torch.no_grad()
    def read(self, reading: Reading, tokens: list[int], pictures: np.ndarray | None = None) -> Reading:
        """Read on; ``pictures`` uint8 [n, h, w, 3] are those of the placeholders among the tokens.
        ``reading`` stays as it is."""
        model, every = self.model, reading.tokens + tokens
        ids = torch.tensor(tokens, device=self.run.device)
        embeddings, maps = model.language_model.embed(ids), reading.maps
        if pictures is not None:
            visual, new = model.encode(planes(torch.from_numpy(pictures).to(self.run.device)))
            places = (ids == self.special.image).nonzero()[:, 0]
            embeddings = embeddings.index_copy(0, places, visual.flatten(0, 1).to(embeddings.dtype))
            maps = torch.cat([maps, new])
        described, count = self._describe(every), len(tokens)
        cache = reading.cache.clone()
        sees = self._sees(described.position[-count:], described.visible[-count:], [0, count])
        hidden = model.language_model(embeddings, sees, maps, cache)
        return Reading(every, reading.hidden + [hidden], maps, cache, self._logits(hidden[-1:])[0])

    @torch.no_grad()
    def step(self, readings: list[Reading], tokens: list[int]) -> tuple[Tensor, list[Reading]]:
        """Read one more token of text after each of several readings with the same images: the next
        logits, float32 [n, vocabulary], and the readings after."""
        every = [reading.tokens + [token] for reading, token in zip(readings, tokens, strict=True)]
        last = [self._describe(stream) for stream in every]
        sees = self._sees(
            np.concatenate([described.position[-1:] for described in last]),
            np.concatenate([described.visible[-1:] for described in last]),
            list(range(len(tokens) + 1)),
        )
        caches = [reading.cache.clone() for reading in readings]
        maps, model = readings[0].maps, self.model.language_model
        hidden = model(model.embed(torch.tensor(tokens, device=self.run.device)), sees, maps, Beams(caches))
        logits = self._logits(hidden)
        after = [
            Reading(stream, reading.hidden + [state], maps, cache, row)
            for stream, reading, state, cache, row in zip(
                every, readings, hidden.split(1), caches, logits, strict=True
            )
        ]
        return logits, after

    @torch.no_grad()
    def draw(self, reading: Reading, options: Options, seed: int) -> np.ndarray:
        """Draw the picture of the BoI just read: uint8 [3, H, W].

        Raises:
            ConfigError: when the run has no image decoder.
        """
        decoder, described = self.model.image_decoder, self._describe(reading.tokens)
        if decoder is None:
            raise ConfigError(f"{self.run.path}: trained without an image decoder, it cannot draw pictures")
        bounds = [(int(described.context_start[-1]), len(reading.tokens) - 1)]
        context, mask = self.model.contexts(torch.cat(reading.hidden), bounds, [0])
        references = torch.from_numpy(described.references[-1:]).to(self.run.device)
        with decoder.averaged():
            picture = decoder.sample(
                context,
                mask,
                reading.maps,
                references,
                steps=options.steps,
                guidance=options.guidance,
                generator_seeds=[seed],
                scheduler=options.scheduler,
            )
        return picture[0].cpu().numpy()

    def see(self, reading: Reading, picture: np.ndarray) -> Reading:
        """Read the placeholders of a picture uint8 [3, H, W] whose BoI was read last."""
        image = Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0)))
        small = crop(image, self.run.config.model.vision.image_size)
        return self.read(reading, self._placeholders(), small[None])

    def _placeholders(self) -> list[int]:
        return [self.special.image] * self.run.config.model.vision.resampler.queries

    def _describe(self, tokens: list[int]) -> RowDescription:
        return describe(np.array(tokens), np.array([0, len(tokens)]), self.special, self.run.config.model)

    def _sees(self, position: np.ndarray, visible: np.ndarray, bounds: list[int]) -> Visibility:
        device = self.run.device
        return Visibility(
            torch.from_numpy(position).long().to(device), bounds, torch.from_numpy(visible).to(device)
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.language_model.logits(hidden).index_fill(1, self.never, -torch.inf)


def generate(run: Run, prompt: Document, options: Options) -> Document:
    """Write a document on.

    After the prompt, text is written until its end or a BoI; at a BoI the image decoder draws from
    the states BOS..BoI with MMFS on the document's earlier images, the picture is read as an input
    image, and text goes on.

    Returns:
        The prompt and what follows, pictures as PNG. Metadata: ``prompt``, number of pieces of the
        prompt; ``new_tokens`` of text; ``new_images``; ``ended``, why it ends.

    Raises:
        DataError: when the prompt cannot be read.
        ConfigError: when a picture is asked for and the run has no image decoder.
    """
    reader = Reader(run)
    writer = _Writer(reader, reader.start(prompt), options)
    ended = writer.picture() if options.picture_first else None
    while ended is None:
        ended = writer.text() or writer.picture()
    facts = {
        "prompt": len(prompt.content),
        "new_tokens": writer.new_tokens,
        "new_images": writer.new_images,
        "ended": ended,
    }
    return Document(prompt.key, prompt.content + writer.content, facts)


class _Writer:
    """The new part of one document; ``text`` and ``picture`` say why it ends, or None."""

    def __init__(self, reader: Reader, reading: Reading, options: Options):
        self.reader, self.reading, self.options = reader, reading, options
        self.generator = torch.Generator().manual_seed(keyed_seed(options.seed, 0, purpose="text"))
        self.content: list[str | bytes] = []
        self.new_tokens = self.new_images = 0
        self.room = reader.run.config.data.context_length

    def text(self) -> str | None:
        """Write text up to its end; a BoI that ends it is left to ``picture``."""
        special = self.reader.special
        left = self.options.text.max_tokens - self.new_tokens
        room = self.room - len(self.reading.tokens)
        if min(left, room) < 1:
            return ENOUGH_TEXT if left < 1 else FULL
        limit = min(left, room)
        options = replace(
            self.options.text, max_tokens=limit, min_tokens=min(self.options.text.min_tokens, limit)
        )
        stops = {special.eos, special.boi}
        before = self._words(self.reading.tokens)
        text = write(self.reading.logits, self.reading, self.reader.step, stops, options, self.generator)
        self.reading = text.state
        words = text.tokens[:-1] if text.ended else text.tokens
        self.new_tokens += len(words)
        # Decoded together, as a tokenizer may spell a word differently at the start of a text.
        decode = self.reader.run.tokenizer.decode
        new = decode(before + words)[len(decode(before)) :]
        if new:
            self.content.append(new)
        if not text.ended:
            return ENOUGH_TEXT if left <= room else FULL
        return ENDED if text.tokens[-1] == special.eos else None

    def picture(self) -> str | None:
        """Draw a picture and read it."""
        if self.new_images == self.options.max_images:
            return ENOUGH_IMAGES
        if len(self.reading.tokens) + 1 + len(self.reader._placeholders()) > self.room:
            return FULL
        at_boi = self.reader.read(self.reading, [self.reader.special.boi])
        seed = keyed_seed(self.options.seed, 0, self.new_images, purpose="picture") >> 1
        picture = self.reader.draw(at_boi, self.options, seed)
        self.reading = self.reader.see(at_boi, picture)
        self.content.append(to_png(picture.transpose(1, 2, 0)))
        self.new_images += 1
        return None

    def _words(self, tokens: list[int]) -> list[int]:
        """The text at the end of the tokens, after the last image."""
        special = self.reader.special
        start = len(tokens)
        while tokens[start - 1] not in (special.bos, special.image):
            start -= 1
        return tokens[start:]
