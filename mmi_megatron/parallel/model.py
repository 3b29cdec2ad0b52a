"""The whole model as it is trained: the plain parts around the sharded language model."""

from __future__ import annotations

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from data_pipeline.rows import SpecialTokens
from mmi_megatron.config import Config
from mmi_megatron.model.image_decoder import ImageDecoder
from mmi_megatron.model.mm_interleaved import Images, MMInterleaved
from mmi_megatron.model.visual_tokenizer import VisualTokenizer
from mmi_megatron.parallel.image_sharding import TensorParallelImages
from mmi_megatron.parallel.language_model import ShardedLanguageModel
from mmi_megatron.parallel.plain import initialise
from mmi_megatron.parallel.spec import transformer_config
from mmi_megatron.platform import device, parameter_dtype


class ShardedMMInterleaved(MMInterleaved):
    """``MMInterleaved`` with what Megatron's schedules and checkpoints ask of a model."""

    model_type = ModelType.encoder_or_decoder

    def set_input_tensor(self, tensor) -> None:
        """Called by the schedule; there is no stage before this one."""

    @property
    def config(self):
        """Megatron's configuration of the language model."""
        return self.language_model.config

    def image_parts(self) -> list[nn.Module]:
        """The replicated modules whose images are divided over the tensor-parallel group."""
        return [part for part in (self.visual_tokenizer, self.image_decoder) if part is not None]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets=(), metadata=None) -> dict:
        """Megatron's sharded tensors of every parameter and buffer."""
        sharded = self.language_model.sharded_state_dict(
            f"{prefix}language_model.", sharded_offsets, metadata
        )
        for name in ("visual_tokenizer", "image_decoder"):
            part = getattr(self, name)
            if part is not None:
                state = part.state_dict(keep_vars=True)
                sharded |= make_sharded_tensors_for_checkpoint(state, f"{prefix}{name}.", {})
        return sharded


def build_model(config: Config, special: SpecialTokens) -> ShardedMMInterleaved:
    """Build this rank's model with its start values, the same model at any layout.

    Process groups must be up (``parallel.groups.initialize``).
    """
    model, seed = config.model, config.train.seed
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = VisualTokenizer(model.vision, model.language.width)
    decoder = None
    if model.loss.next_image:
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)
            decoder = ImageDecoder(model.decoder, model.language.width, model.vision.width, tokenizer.shapes)
    language = ShardedLanguageModel(
        transformer_config(config),
        model.language,
        model.vision.width,
        tokenizer.shapes,
        special.boi,
        special.image,
    )
    initialise(language, seed)
    images = TensorParallelImages() if config.parallel.shard_images else Images()
    whole = ShardedMMInterleaved(model, language, tokenizer, decoder, images)
    return whole.to(device=device(), dtype=parameter_dtype(config.train.precision))
