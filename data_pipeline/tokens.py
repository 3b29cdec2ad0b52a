"""The tokenizer: trained here (byte-level BPE) or loaded from a ``tokenizer.json``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from data_pipeline.errors import DataError
from data_pipeline.rows import SpecialTokens

BOS, EOS, PAD, BOI, IMAGE = "<s>", "</s>", "<pad>", "<|boi|>", "<|image|>"
SPECIAL = (BOS, EOS, PAD, BOI, IMAGE)
UNKNOWN = "<unk>"


class Tokenizer:
    """Text to ids and back.

    Text is never read as structure: ``<s>`` written in a document is encoded as characters.

    Attributes:
        special: ids of the structural tokens.
        size: number of ids.
        fingerprint: hexadecimal digest; changes with anything that changes an encoding.
    """

    def __init__(self, backend: Backend):
        self._backend = backend
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        pad = PAD if backend.token_to_id(PAD) is not None else UNKNOWN
        ids = [_id_of(backend, token) for token in (BOS, EOS, pad, BOI, IMAGE)]
        self.special = SpecialTokens(*ids)
        self.size = backend.get_vocab_size(with_added_tokens=True)
        self.fingerprint = hashlib.blake2b(backend.to_str().encode(), digest_size=8).hexdigest()
        self._structural = frozenset(ids)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, structural tokens neither added nor read."""
        # BPE never builds a structural token from characters; other models of a foreign file might.
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return ids if self._structural.isdisjoint(ids) else [t for t in ids if t not in self._structural]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, structural tokens left out."""
        kept = [int(token) for token in ids if int(token) not in self._structural and 0 <= token < self.size]
        return self._backend.decode(kept, skip_special_tokens=False)

    def save(self, path: Path | str) -> None:
        """Write ``tokenizer.json``."""
        self._backend.save(str(path))


def _id_of(backend: Backend, token: str) -> int:
    found = backend.token_to_id(token)
    if found is None:
        raise DataError(f"tokenizer: no {token!r} in it")
    return found


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a ``tokenizer.json``, or the one in a folder.

    Image tokens that it lacks are appended, so that LLaMA's becomes the release's: 32002 ids, 32000
    for BoI and 32001 for the placeholder. Padding is ``<pad>``; in a table without it ``<unk>`` where
    text never yields that (LLaMA spells unknown characters in bytes), else it is appended too. The
    release pads with 31999, an ordinary word; no weight depends on it, as padding is never attended.

    Raises:
        DataError: when it is not a tokenizer, or has no ``<s>`` and ``</s>``.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"tokenizer {str(file)!r}: no such file; train one with `mmi data tokenizer`")
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # tokenizers raises the bare class for every bad file
        raise DataError(f"tokenizer {str(file)!r}: not a tokenizer.json ({error})") from None
    for token in (BOS, EOS):
        if backend.token_to_id(token) is None:
            raise DataError(
                f"tokenizer {str(file)!r}: no {token!r} in it; use a LLaMA-type one or `mmi data tokenizer`"
            )
    spare = getattr(backend.model, "byte_fallback", False) and backend.token_to_id(UNKNOWN) is not None
    wanted = (BOI, IMAGE) if spare else (BOI, IMAGE, PAD)
    missing = [token for token in wanted if backend.token_to_id(token) is None]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in missing])
    return Tokenizer(backend)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train byte-level BPE.

    Args:
        texts: what to learn from.
        vocabulary: ids in all; at least the 256 bytes and the structural tokens. A small corpus
            may give fewer.

    Raises:
        DataError: when ``vocabulary`` is too small.
    """
    smallest = 256 + len(SPECIAL)
    if vocabulary < smallest:
        raise DataError(f"--vocab {vocabulary}: at least {smallest} (256 bytes and {len(SPECIAL)} special)")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)
