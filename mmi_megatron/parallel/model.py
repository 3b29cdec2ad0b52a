"""The whole model as it is trained, or the stages of it that a pipeline rank holds: the plain parts
around the sharded language model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from data_pipeline.rows import SpecialTokens
from mmi_megatron.config import Config
from mmi_megatron.layout import Stage, stages
from mmi_megatron.model.image_decoder import ImageDecoder
from mmi_megatron.model.mm_interleaved import Images, Inputs, Losses, MMInterleaved
from mmi_megatron.model.visual_tokenizer import VisualTokenizer
from mmi_megatron.model.vit_adapter import pyramid_shapes
from mmi_megatron.parallel import context, payload
from mmi_megatron.parallel.image_sharding import DividedImages, ReplicatedImages
from mmi_megatron.parallel.language_model import ShardedLanguageModel
from mmi_megatron.parallel.plain import initialise
from mmi_megatron.parallel.spec import transformer_config
from mmi_megatron.platform import device, parameter_dtype

Finish = Callable[[Inputs, Tensor, Tensor], object]
"""What the last stage does with a micro-batch, its hidden states [T, width] and its maps [I, S, C]."""


class ShardedMMInterleaved(MMInterleaved):
    """``MMInterleaved``, or one pipeline stage of it, with what Megatron's schedules and checkpoints ask
    of a model.

    Attributes:
        stage: which one.
        shapes: (height, width) of the maps' levels.
        ready: called with a part before its parameters are read other than through Megatron's hooks;
            ``train.optimizer.wrap`` lets it wait for parameters that are still being gathered.
        vision_ahead: whether the schedule calls ``run_ahead`` where this is the first of several stages.
    """

    model_type = ModelType.encoder_or_decoder
    share_embeddings_and_output_weights = False

    def __init__(
        self, *arguments, stage: Stage, shapes: payload.Shapes, vision_ahead: bool = False, **options
    ):
        super().__init__(*arguments, **options)
        self.stage, self.shapes = stage, shapes
        self.vp_stage = stage.index // self.config.pipeline_model_parallel_size
        self.pre_process = stage.first
        self.ready: Callable[[nn.Module], None] = lambda part: None
        self.vision_ahead = vision_ahead
        self._payload: Tensor | None = None
        self._ahead: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def set_input_tensor(self, tensor: Tensor | list[Tensor]) -> None:
        """Called by the schedule with the payload of the stage before."""
        self._payload = tensor[0] if isinstance(tensor, list) else tensor

    def forward(  # type: ignore[override]
        self, inputs: Inputs, seed: int = 0, step: int = 0, finish: Finish | None = None
    ) -> Tensor | Losses | object:
        """This stage's work on a micro-batch.

        Args:
            inputs: the micro-batch, the same on all stages but for the pixels.
            seed, step: key the noise of the losses.
            finish: what the last stage does in place of the losses, with the hidden states of this
                context-parallel rank.

        Returns:
            The payload for the next stage; on the last, ``Losses`` or what ``finish`` returns.
        """
        hidden, maps = self._begin(inputs)
        hidden = self.language_model.run(hidden, inputs.sees, maps)
        if not self.stage.last:
            return payload.pack(hidden, maps, self._route(inputs, self.stage.stop))
        hidden = self.language_model.leave(hidden)
        if finish is not None:
            return finish(inputs, hidden, maps)
        return self.losses(inputs, hidden, maps, seed, step)

    def _begin(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Hidden states of this rank and the maps, from the images or from the stage before."""
        if self.stage.first:
            embeddings, maps = self.embed(inputs)
            return self.language_model.enter(embeddings), maps
        if self._payload is None:
            raise RuntimeError(f"pipeline stage {self.stage.index} was called without its input")
        received, self._payload = self._payload, None
        tokens = len(context.part(inputs.tokens))
        if self.config.sequence_parallel:
            tokens //= self.config.tensor_model_parallel_size
        channels = self.settings.vision.width
        return payload.unpack(received, tokens, channels, self._route(inputs, self.stage.start))

    def _route(self, inputs: Inputs, layer: int) -> payload.Route:
        return payload.route(inputs, self.settings, self.shapes, layer)

    def embed(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See ``MMInterleaved.embed``."""
        self.ready(self.visual_tokenizer)
        if self.language_model.image_tokens is not None:
            self.ready(self.language_model.image_tokens)
        return super().embed(inputs)

    def place(self, embeddings: Tensor, visual: Tensor, placeholders: Tensor) -> Tensor:
        """See ``MMInterleaved.place``; embeddings [t, width] of this context-parallel rank's tokens."""
        if self.config.context_parallel_size > 1:  # a GPU is waited for, to know how many there are
            placeholders, which = context.own(placeholders, len(embeddings))
            visual = visual[which]
        return super().place(embeddings, visual, placeholders)

    def run_ahead(self, inputs: Inputs) -> None:
        """Tokenize the images of the micro-batch that comes next."""
        self._ahead = inputs.images, super().encode(inputs.images)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See ``MMInterleaved.encode``; what ``run_ahead`` has made of these images is taken from there."""
        if self._ahead is None or self._ahead[0] is not images:
            return super().encode(images)
        (_, encoded), self._ahead = self._ahead, None
        return encoded

    def losses(self, inputs: Inputs, hidden: Tensor, maps: Tensor, seed: int, step: int) -> Losses:
        """See ``MMInterleaved.losses``."""
        if self.image_decoder is not None:
            self.ready(self.image_decoder)
        return super().losses(inputs, hidden, maps, seed, step)

    @property
    def config(self) -> TransformerConfig:
        """Megatron's configuration of the language model."""
        return self.language_model.config

    def image_parts(self) -> list[nn.Module]:
        """The replicated modules of this stage whose images are divided over the ranks."""
        return [part for part in (self.visual_tokenizer, self.image_decoder) if part is not None]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets=(), metadata=None) -> dict:
        """Megatron's sharded tensors of every parameter and buffer of this stage."""
        sharded = self.language_model.sharded_state_dict(
            f"{prefix}language_model.", sharded_offsets, metadata
        )
        for name in ("visual_tokenizer", "image_decoder"):
            part = getattr(self, name)
            if part is not None:
                state = part.state_dict(keep_vars=True)
                sharded |= make_sharded_tensors_for_checkpoint(state, f"{prefix}{name}.", {})
        return sharded


def build_stages(config: Config, special: SpecialTokens) -> list[ShardedMMInterleaved]:
    """Build the pipeline stages of this rank with their start values, the same model at any layout.

    Process groups must be up (``parallel.groups.initialize``).
    """
    rank, size = parallel_state.get_pipeline_model_parallel_rank(), config.parallel.pipeline
    transformer = transformer_config(config)
    return [_build_stage(config, special, transformer, stage) for stage in stages(config)[rank::size]]


def build_model(config: Config, special: SpecialTokens) -> ShardedMMInterleaved:
    """The same of a rank that holds a single stage: all, where there is no pipeline."""
    (model,) = build_stages(config, special)
    return model


def _build_stage(
    config: Config, special: SpecialTokens, transformer: TransformerConfig, stage: Stage
) -> ShardedMMInterleaved:
    model, seed = config.model, config.train.seed
    shapes = pyramid_shapes(model.vision.image_size // model.vision.patch_size)
    tokenizer = decoder = None
    if stage.first:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            tokenizer = VisualTokenizer(model.vision, model.language.width)
    if stage.last and model.loss.next_image:
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)
            decoder = ImageDecoder(model.decoder, model.language.width, model.vision.width, shapes)
    language = ShardedLanguageModel(
        transformer,
        model.language,
        model.vision.width,
        shapes,
        special.boi,
        special.image,
        stage,
        config.parallel.mmfs,
    )
    initialise(language, seed)
    images: Images = DividedImages() if config.parallel.shard_images else ReplicatedImages()
    whole = ShardedMMInterleaved(
        model,
        language,
        tokenizer,
        decoder,
        images,
        config.train.recompute,
        stage=stage,
        shapes=shapes,
        vision_ahead=config.parallel.vision_ahead,
    )
    return whole.to(device=device(), dtype=parameter_dtype(config.train.precision))
