"""Who holds what: replicas and pipeline stages; known before any rank is started."""

from __future__ import annotations

from dataclasses import dataclass

from mmi_megatron.config import Config
from mmi_megatron.errors import ConfigError


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline.

    Attributes:
        index, count: which of how many, in the order in which a micro-batch passes them.
        start, stop: its layers of the language model, half-open, counted from 0.
    """

    index: int
    count: int
    start: int
    stop: int

    @property
    def first(self) -> bool:
        """Whether it holds the visual tokenizer and the embeddings."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether it holds the head and the image decoder."""
        return self.index == self.count - 1

    @property
    def layers(self) -> range:
        """Its layers."""
        return range(self.start, self.stop)


def stages(config: Config) -> list[Stage]:
    """All stages of the pipeline. Stage s is on pipeline rank ``s % parallel.pipeline``.

    Raises:
        ConfigError: when the layers do not divide into them, or interleaving has nothing to interleave.
    """
    parallel, layers = config.parallel, config.model.language.layers
    count = parallel.pipeline * parallel.virtual
    if parallel.virtual > 1 and parallel.pipeline == 1:
        raise ConfigError(
            f"parallel.virtual: {parallel.virtual} stages a rank need a pipeline; got parallel.pipeline=1"
        )
    sizes = list(parallel.stages) or [layers // count] * count
    if len(sizes) != count:
        raise ConfigError(
            f"parallel.stages: {len(sizes)} entries, one is needed for each of the {count} stages of "
            f"parallel.pipeline={parallel.pipeline} times parallel.virtual={parallel.virtual}"
        )
    if min(sizes) < 0:
        raise ConfigError(f"parallel.stages: layers of a stage must be at least 0, got {sizes}")
    if sum(sizes) != layers:
        hint = f"{sizes} make {sum(sizes)} layers" if parallel.stages else f"{count} stages are not even"
        raise ConfigError(
            f"parallel.stages: {layers} layers (model.language.layers) for {count} stages, but {hint}; "
            f"name the layers of each, such as parallel.stages={_uneven(layers, count)}"
        )
    bounds = [sum(sizes[:index]) for index in range(count + 1)]
    return [Stage(index, count, bounds[index], bounds[index + 1]) for index in range(count)]


def _uneven(layers: int, count: int) -> list[int]:
    """A division with the spare layers in the middle: the ends hold tokenizer and decoder besides."""
    sizes, spare = [layers // count] * count, layers % count
    for index in range((count - spare + 1) // 2, (count - spare + 1) // 2 + spare):
        sizes[index] += 1
    return sizes


def data_parallel_size(config: Config, ranks: int) -> int:
    """Data-parallel replicas of the model among ``ranks`` ranks.

    Raises:
        ConfigError: when the layout or the global batch does not divide, saying what would.
    """
    parallel, train = config.parallel, config.train
    each = parallel.tensor * parallel.pipeline * parallel.context
    if ranks < 1 or ranks % each:
        raise ConfigError(
            f"parallel.tensor: a replica of the model takes {each} ranks (tensor {parallel.tensor} x "
            f"context {parallel.context} x pipeline {parallel.pipeline}), which does not divide the {ranks} "
            f"of this run; start a multiple of {each} or change parallel.tensor={parallel.tensor}"
        )
    replicas = ranks // each
    if replicas % parallel.optimizer_copies:
        raise ConfigError(
            f"parallel.optimizer_copies: {parallel.optimizer_copies} copies are not even among the "
            f"{replicas} replicas that {ranks} ranks make; 1 fits any number"
        )
    if train.rows % (replicas * train.micro_rows):
        raise ConfigError(
            f"train.rows: {train.rows} is no multiple of train.micro_rows={train.micro_rows} times the "
            f"{replicas} replicas that {ranks} ranks make"
        )
    micro_batches = train.rows // (replicas * train.micro_rows)
    if parallel.virtual > 1 and micro_batches % parallel.pipeline:
        raise ConfigError(
            f"train.rows: {train.rows} rows are {micro_batches} micro-batches a replica, and "
            f"parallel.virtual={parallel.virtual} takes them in turns of parallel.pipeline="
            f"{parallel.pipeline}; make them a multiple of that"
        )
    return replicas
