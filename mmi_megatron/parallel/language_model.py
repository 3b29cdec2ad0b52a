"""The language model on Megatron-Core, divided over the tensor-parallel group."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from data_pipeline.batch import IGNORED
from mmi_megatron.config import LanguageConfig
from mmi_megatron.layout import Stage
from mmi_megatron.model.attention import rotary_angles
from mmi_megatron.model.language_model import ImageTokens, LevelSelect, Visibility, padded_vocabulary
from mmi_megatron.parallel import context
from mmi_megatron.parallel.spec import Documents, block_spec


class ShardedLanguageModel(MegatronModule):
    """Twin of ``model.language_model.LanguageModel``, or a pipeline stage of it.

    Weights are zero until ``parallel.plain`` fills them in from the plain twin's. ``embed`` is for the
    first stage, ``logits`` and ``token_losses`` for the last; ``forward`` for a single one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        language: LanguageConfig,
        maps_width: int,
        shapes: tuple[tuple[int, int], ...],
        boi: int,
        image: int,
        stage: Stage,
        mmfs_divide: str = "heads",
    ):
        super().__init__(config=config)
        self.boi, self.image, self.stage = boi, image, stage
        self.mmfs_divide = mmfs_divide
        self.select = LevelSelect(language, shapes)
        language, shapes = self.select.inner
        self.language, self.maps_width, self.shapes = language, maps_width, shapes
        rows = padded_vocabulary(language)
        self.embedding: Any = None
        if stage.first:
            self.embedding = VocabParallelEmbedding(
                rows, language.width, init_method=nn.init.zeros_, config=config
            )
        self.decoder = TransformerBlock(
            config,
            block_spec(language, maps_width, shapes, stage.layers, mmfs_divide),
            post_process=stage.last,
            vp_stage=stage.index // config.pipeline_model_parallel_size,
        )
        self.output_layer: Any = None
        if stage.last:
            # The hidden states are gathered before the head, which reads them whole.
            whole = copy.copy(config)
            whole.sequence_parallel = False
            self.output_layer = ColumnParallelLinear(
                language.width,
                rows,
                config=whole,
                init_method=nn.init.zeros_,
                bias=False,
                gather_output=False,
            )
        self.image_tokens: Any = None
        if language.train_image_tokens and (stage.first or stage.last):
            self.image_tokens = ImageTokens(language).to(config.params_dtype)
            if not stage.first:
                self.image_tokens.embedding = None
            if not stage.last:
                self.image_tokens.head = None

    def embed(self, tokens: Tensor) -> Tensor:
        """See ``LanguageModel.embed``: [t, width] of this context-parallel rank's t of the T tokens."""
        tokens = context.part(tokens)
        embeddings = self.embedding(tokens)
        if self.image_tokens is not None:
            is_boi = (tokens == self.boi)[:, None].to(embeddings.dtype)
            embeddings = embeddings + is_boi * self.image_tokens.embedding
        return embeddings

    def forward(self, embeddings: Tensor, sees: Visibility, maps: Tensor) -> Tensor:
        """See ``LanguageModel.forward``."""
        return self.leave(self.run(self.enter(embeddings), sees, maps))

    def enter(self, embeddings: Tensor) -> Tensor:
        """Hidden states of this rank, [t, 1, width] or its part of them under sequence parallelism."""
        hidden = embeddings.unsqueeze(1)
        return scatter_to_sequence_parallel_region(hidden) if self.config.sequence_parallel else hidden

    def leave(self, hidden: Tensor) -> Tensor:
        """Hidden states [t, width] of those that each tensor-parallel rank has."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden.squeeze(1)

    def run(self, hidden: Tensor, sees: Visibility, maps: Tensor) -> Tensor:
        """This stage's layers, and the final norm in the last one.

        Args:
            hidden: [t, 1, width], or this rank's part under sequence parallelism.
            sees: structure of the whole stream.
            maps: [I, S, maps_width]. Their gradient is this rank's part, to be summed over the
                tensor- and context-parallel ranks.

        Returns:
            Of the shape of ``hidden``.
        """
        head_width = self.language.width // self.language.heads
        position = context.part(sees.position)
        angles = rotary_angles(position, head_width, self.language.rope_theta)
        return self.decoder(
            hidden,
            attention_mask=None,
            context=self.select(maps).flatten(0, 1).unsqueeze(1),
            context_mask=context.part(sees.visible),
            rotary_pos_emb=angles[:, None, None],
            packed_seq_params=Documents(sees.bounds),
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        """This rank's columns of the logits, float32, padded rows at minus infinity."""
        logits = self.output_layer(hidden)[0].float()
        rank = parallel_state.get_tensor_model_parallel_rank()
        first = rank * logits.shape[-1]
        columns = torch.arange(first, first + logits.shape[-1], device=logits.device)
        if self.image_tokens is not None:
            # Both rows are computed on every rank and belong to one; the gradient is shared.
            rows = copy_to_tensor_model_parallel_region(self.image_tokens.head(hidden).float())
            for token, row in zip((self.boi, self.image), rows.unbind(-1), strict=True):
                logits = torch.where(columns == token, row[:, None], logits)
        return logits.masked_fill(columns >= self.language.vocabulary, -torch.inf)

    def logits(self, hidden: Tensor) -> Tensor:
        """See ``LanguageModel.logits``."""
        return gather_from_tensor_model_parallel_region(self._logits(hidden))[:, : self.language.vocabulary]

    def token_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """See ``LanguageModel.token_losses``: float32 [T], alike on all ranks, from this context-parallel
        rank's hidden states [t, width] and all labels [T]."""
        labels = context.part(labels)
        kept = labels != IGNORED
        losses = vocab_parallel_cross_entropy(self._logits(hidden).unsqueeze(1), labels.clamp_min(0)[:, None])
        return context.gather(losses.squeeze(1).masked_fill(~kept, 0.0), alike=True)

    def mmfs_parts(self) -> Iterator[nn.Module]:
        """MMFS, its norm and its gate, layer by layer."""
        for layer in self.decoder.layers:
            if hasattr(layer.cross_attn_bda, "gate"):
                yield from (layer.pre_cross_attn_layernorm, layer.cross_attention, layer.cross_attn_bda)

    def freeze(self) -> None:
        """See ``LanguageModel.freeze``."""
        self.requires_grad_(False)
        for module in self.mmfs_parts():
            module.requires_grad_(True)
        if self.image_tokens is not None:
            self.image_tokens.requires_grad_(True)
