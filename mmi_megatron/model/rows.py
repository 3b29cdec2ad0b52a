"""The torch face of ``data_pipeline.rows``: who sees what and what is predicted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipeline.rows import RowDescription, SpecialTokens, describe_stream


@dataclass(frozen=True)
class Rows:
    """Structure of a batch [B, S] of rows with M images; fields as in ``RowDescription``.

    Intervals (``visible_first``..``visible_last``, ``reference_first``..``reference_last``) are
    half-open and count the images of the row from 0.
    """

    document: Tensor
    position: Tensor
    image_row: Tensor
    image_boi: Tensor
    visible_first: Tensor
    visible_last: Tensor
    context_start: Tensor
    reference_first: Tensor
    reference_last: Tensor
    labels: Tensor
    image_loss: Tensor


def describe_rows(
    token_ids: Tensor,
    *,
    bos: int,
    eos: int,
    pad: int,
    boi: int,
    image_token: int,
    pair_source: bool | Tensor | np.ndarray = False,
    release: bool = False,
    max_images: int | None = None,
    max_references: int | None = None,
) -> Rows:
    """Describe rows [B, S]; the arguments are those of ``data_pipeline.rows.describe_stream``.

    Returns:
        ``Rows`` on the device of ``token_ids``: int64 fields, bool ``image_loss``.

    Raises:
        ValueError: when ``token_ids`` is not [B, S] or ``pair_source`` fits neither a bool nor [B, S].
    """
    if token_ids.ndim != 2:
        raise ValueError(f"token_ids: expected [B, S], got {tuple(token_ids.shape)}")
    rows, length = token_ids.shape
    pair = torch.as_tensor(pair_source)
    if pair.ndim and pair.shape != token_ids.shape:
        raise ValueError(
            f"pair_source: expected a bool or one a token, {tuple(token_ids.shape)}, got {tuple(pair.shape)}"
        )
    described = describe_stream(
        token_ids.reshape(-1).cpu().numpy(),
        np.arange(rows + 1) * length,
        SpecialTokens(bos=bos, eos=eos, pad=pad, boi=boi, image=image_token),
        pair_source=pair.expand(token_ids.shape).reshape(-1).cpu().numpy(),
        release=release,
        max_images=max_images,
        max_references=max_references,
    )
    return _to_rows(described, (rows, length), token_ids.device)


def _to_rows(described: RowDescription, shape: tuple[int, int], device: torch.device) -> Rows:
    def tensor(array: np.ndarray) -> Tensor:
        moved = torch.from_numpy(array).to(device)
        return moved if moved.dtype == torch.bool else moved.long()

    visible = tensor(described.visible).view(*shape, 2)
    references = tensor(described.references)
    return Rows(
        document=tensor(described.document).view(shape),
        position=tensor(described.position).view(shape),
        image_row=tensor(described.image_row),
        image_boi=tensor(described.image_boi),
        visible_first=visible[..., 0],
        visible_last=visible[..., 1],
        context_start=tensor(described.context_start),
        reference_first=references[:, 0],
        reference_last=references[:, 1],
        labels=tensor(described.labels).view(shape),
        image_loss=tensor(described.image_loss),
    )
