"""The language model on Megatron-Core, divided over the tensor-parallel group."""

from __future__ import annotations

import copy
from collections.abc import Iterator

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
from mmi_megatron.model.attention import rotary_angles
from mmi_megatron.model.language_model import ImageTokens, LevelSelect, Visibility, padded_vocabulary
from mmi_megatron.parallel.spec import Documents, block_spec


class ShardedLanguageModel(MegatronModule):
    """Twin of ``model.language_model.LanguageModel``; arguments and results are the same.

    Weights are zero until ``parallel.plain`` fills them in from the plain twin's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        language: LanguageConfig,
        maps_width: int,
        shapes: tuple[tuple[int, int], ...],
        boi: int,
        image: int,
    ):
        super().__init__(config=config)
        self.boi, self.image = boi, image
        self.select = LevelSelect(language, shapes)
        language, shapes = self.select.inner
        self.language, self.maps_width, self.shapes = language, maps_width, shapes
        rows = padded_vocabulary(language)
        self.embedding = VocabParallelEmbedding(
            rows, language.width, init_method=nn.init.zeros_, config=config
        )
        self.decoder = TransformerBlock(config, block_spec(language, maps_width, shapes))
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
        self.image_tokens = (
            ImageTokens(language).to(config.params_dtype) if language.train_image_tokens else None
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """See ``LanguageModel.embed``."""
        embeddings = self.embedding(tokens)
        if self.image_tokens is not None:
            is_boi = (tokens == self.boi)[:, None].to(embeddings.dtype)
            embeddings = embeddings + is_boi * self.image_tokens.embedding
        return embeddings

    def forward(self, embeddings: Tensor, sees: Visibility, maps: Tensor) -> Tensor:
        """See ``LanguageModel.forward``."""
        head_width = self.language.width // self.language.heads
        angles = rotary_angles(sees.position, head_width, self.language.rope_theta)
        hidden = embeddings.unsqueeze(1)
        maps = self.select(maps)
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden)
        hidden = self.decoder(
            hidden,
            attention_mask=None,
            context=maps.flatten(0, 1).unsqueeze(1),
            context_mask=sees.visible,
            rotary_pos_emb=angles[:, None, None],
            packed_seq_params=Documents(sees.bounds),
        )
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden.squeeze(1)

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
        """See ``LanguageModel.token_losses``."""
        kept = labels != IGNORED
        losses = vocab_parallel_cross_entropy(self._logits(hidden).unsqueeze(1), labels.clamp_min(0)[:, None])
        return losses.squeeze(1).masked_fill(~kept, 0.0)

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
