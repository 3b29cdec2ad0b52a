"""Image-text pairs as img2dataset writes them: tar members ``key.jpg``, ``key.txt``, ``key.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.errors import BadSample, DataError
from data_pipeline.formats import Document, Member, Summary, read_range, scan_file
from data_pipeline.importers.common import Drop, checked_image, find_inputs, run_import
from data_pipeline.tokens import load_tokenizer

IMAGES = ("jpg", "jpeg", "png", "webp", "gif")


def import_pairs(
    folder: Path | str, out: Path | str, min_tokens: int = 0, tokenizer: Path | str | None = None
) -> Summary:
    """Import pairs: documents of one image followed by its caption.

    Args:
        folder: tar files, or a folder of them.
        out: folder of shards to write.
        min_tokens: captions of fewer tokens are dropped; the paper drops LAION-COCO's under 10.
        tokenizer: ``tokenizer.json`` that counts them.

    Raises:
        DataError: when there are no tar files, no pair is kept, or a limit has no tokenizer.
    """
    shards = find_inputs(folder, ("*.tar",))
    if min_tokens and tokenizer is None:
        raise DataError("--min-tokens needs --tokenizer to count with")
    encode = load_tokenizer(tokenizer).encode if tokenizer is not None else str.split

    def documents(drop: Drop) -> Iterator[Document]:
        for shard in shards:
            seen: set[str] = set()
            for key, members in scan_file(shard):
                try:
                    if key in seen:
                        raise BadSample("members of the key do not lie together")
                    seen.add(key)
                    document = _pair(shard, key, members)
                    if len(encode(document.metadata["caption"])) < min_tokens:
                        raise BadSample(f"caption under {min_tokens} tokens")
                except BadSample as bad:
                    drop(bad.reason)
                else:
                    del document.metadata["caption"]
                    yield document

    return run_import(documents, out, folder)


def _pair(shard: Path, key: str, members: list[Member]) -> Document:
    for member in members:
        if member.problem:
            raise BadSample(member.problem, member.name)
    blobs = {member.name.lower(): member for member in members}
    image = next((blobs[name] for name in IMAGES if name in blobs), None)
    if image is None:
        raise BadSample("pair without an image")
    metadata = _metadata(shard, blobs.get("json"))
    if "txt" in blobs:
        try:
            caption = read_range(shard, blobs["txt"].offset, blobs["txt"].size).decode("utf-8").strip()
        except UnicodeDecodeError:
            raise BadSample("caption is not UTF-8") from None
    else:
        caption = str(metadata.get("caption") or "").strip()
    if not caption:
        raise BadSample("pair without a caption")
    picture = checked_image(read_range(shard, image.offset, image.size))
    return Document(key, [picture, caption], {**metadata, "caption": caption})


def _metadata(shard: Path, member: Member | None) -> dict[str, Any]:
    if member is None:
        return {}
    try:
        value = json.loads(read_range(shard, member.offset, member.size).decode("utf-8"))
    except (ValueError, RecursionError):
        raise BadSample("json cannot be read") from None
    if not isinstance(value, dict):
        raise BadSample("json cannot be read", "not an object")
    return value
