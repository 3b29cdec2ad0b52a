"""Bytes that a rank sends in a training step, group by group: counted as they go, and from the sizes.

Both take what the ring algorithms send, the least that n ranks can do with: of a tensor of B bytes an
all-gather or a reduce-scatter sends (n - 1) / n B from each rank, an all-reduce twice that, an all-to-all
of B on each rank (n - 1) / n B, a message B.
The groups are those of ``GROUPS``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmi_megatron.config import Config
from mmi_megatron.model.language_model import has_mmfs
from mmi_megatron.model.mm_interleaved import Inputs
from mmi_megatron.parallel import payload
from mmi_megatron.parallel.model import ShardedMMInterleaved
from mmi_megatron.platform import parameter_dtype

TENSOR, CONTEXT, PIPELINE, DATA = "tensor", "context", "pipeline", "data x context"
IMAGES, OTHER = "data x context x tensor", "other"
GROUPS = {
    TENSOR: "activations, and gradients of what sequence parallelism replicates",
    CONTEXT: "tokens for heads and back in attention; hidden states, visual tokens and maps for images",
    PIPELINE: "payloads between stages and their gradients",
    DATA: "gradients and parameters of the language model over its replicas and context parallelism",
    IMAGES: "gradients and parameters of the modules whose images are divided, over these and tensor "
    "parallelism",
    OTHER: "norms, counts and checks",
}
"""Each group and what it sends."""


ALIGNED = 64
"""Elements (megatron.core.distributed.param_and_grad_buffer)."""


class Sent(TorchDispatchMode):
    """Inside, counts what this process sends; the backward pass included. For tests and measurements: it
    sees every operation of torch, which takes time.

    Attributes:
        bytes: by group.

    Raises:
        RuntimeError: at a collective that is none of those a step is made of; nothing goes uncounted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, float] = defaultdict(float)
        groups = (
            (TENSOR, parallel_state.get_tensor_model_parallel_group()),
            (CONTEXT, parallel_state.get_context_parallel_group()),
            (DATA, parallel_state.get_data_parallel_group()),
            (DATA, parallel_state.get_data_parallel_group(with_context_parallel=True)),
            (IMAGES, parallel_state.get_expert_data_parallel_group()),
        )
        self._labels = {group.group_name: label for label, group in groups}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Sequence[Any]) -> None:
        if name in ("recv_", "recv_any_source_", "barrier", "monitored_barrier_"):
            return
        group = dist.ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject)))
        if name == "send":
            self.bytes[PIPELINE] += _bytes(args[0])
            return
        others = (group.size() - 1) / group.size()
        if name in ("allreduce_", "allreduce_coalesced_"):
            sent = 2 * others * _bytes(args[0])
        elif name in ("_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_"):
            sent = others * _bytes(args[0])  # the output, whole
        elif name in ("_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_", "reduce_scatter_"):
            sent = others * _bytes(args[1])  # the input, whole
        elif name == "alltoall_base_":
            sent = others * _bytes(args[1])  # the input; as much comes back
        elif name == "broadcast_":
            sent = _bytes(args[0])
        else:
            raise RuntimeError(f"c10d::{name} has no rule for the bytes it sends; add one to Sent._count")
        self.bytes[self._labels.get(group.group_name, OTHER)] += sent


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(tensor) for tensor in tensors)


def expected(
    config: Config, stages: Sequence[ShardedMMInterleaved], inputs: Iterable[Inputs], replicas: int
) -> dict[str, float]:
    """What this rank sends in a step by the sizes of its stages and of its micro-batches.

    Left out is what does not grow with the model: counts, norms, checks.

    Args:
        config: of the run.
        stages: of this rank, not wrapped.
        inputs: its replica's micro-batches.
        replicas: data-parallel.

    Returns:
        Bytes by group; nothing for ``OTHER``.
    """
    sent: dict[str, float] = defaultdict(float)
    for micro_batch in inputs:
        for stage in stages:
            count = _Activations(config, stage, micro_batch)
            sent[TENSOR] += count.tensor()
            sent[CONTEXT] += count.context()
            sent[PIPELINE] += count.pipeline()
    width = parameter_dtype(config.train.precision).itemsize
    tensor, context = config.parallel.tensor, config.parallel.context
    for stage in stages:
        trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
        images = [parameter for parameter in trained if not getattr(parameter, "allreduce", True)]
        for label, ranks, whole in (
            (DATA, replicas * context, _size(trained) - _size(images)),
            (IMAGES, replicas * context * tensor, _size(images)),
        ):
            # Gradients are reduce-scattered in fp32, parameters all-gathered as they are.
            sent[label] += (ranks - 1) / ranks * whole * (4 + width)
        if config.parallel.sequence:
            summed = [parameter for parameter in trained if getattr(parameter, "sequence_parallel", False)]
            elements = sum(parameter.numel() for parameter in summed)
            sent[TENSOR] += 2 * (tensor - 1) / tensor * 4 * elements
    return {label: sent[label] for label in (TENSOR, CONTEXT, PIPELINE, DATA, IMAGES)}


def _size(parameters: Iterable[nn.Parameter]) -> int:
    """Elements in Megatron's buffers, where each parameter begins at a multiple of ``ALIGNED``."""
    return sum(-(-parameter.numel() // ALIGNED) * ALIGNED for parameter in parameters)


class _Activations:
    """What the forward and backward pass of one micro-batch through one stage send.

    Attributes:
        ranks, parts: tensor- and context-parallel.
        hidden: bytes of the hidden states of one context-parallel rank.
    """

    def __init__(self, config: Config, stage: ShardedMMInterleaved, inputs: Inputs):
        self.config, self.model, self.stage, self.inputs = config, config.model, stage, inputs
        self.ranks, self.parts = config.parallel.tensor, config.parallel.context
        self.tokens = len(inputs.tokens) // self.parts
        self.width = parameter_dtype(config.train.precision).itemsize
        self.hidden = self.tokens * self.model.language.width * self.width
        self.positions = sum(height * width for height, width in stage.shapes)

    def part(self, whole: float) -> float:
        """An all-gather of what is ``whole`` bytes then, or a reduce-scatter of what was."""
        return (self.ranks - 1) / self.ranks * whole

    def reduce(self, whole: float) -> float:
        """An all-reduce."""
        return 2 * self.part(whole)

    def tensor(self) -> float:
        """Over the tensor-parallel group."""
        stage, sent = self.stage.stage, 0.0
        again = 2 if self.config.train.recompute.language == "full" else 1
        for layer in stage.layers:
            forward, backward = self._layer(has_mmfs(self.model.language, layer))
            sent += again * forward + backward
        if stage.first:
            sent += self._first()
        else:
            sent += 2 * self.part(self.ranks * self._share(stage.start))
        return sent + (self._last() if stage.last else 0.0)

    def context(self) -> float:
        """Over the context-parallel group: heads for tokens in every layer; what images are made into, and
        the hidden states that images are drawn from."""
        if self.parts == 1:
            return 0.0
        stage = self.stage.stage
        passes = 2 if self.config.train.recompute.language == "none" else 3
        whole = self._exchanged() * passes * len(stage.layers)
        if stage.first:
            tokens, maps = self._seen()
            whole += 2 * self.parts * (tokens + maps)
        else:
            whole += 2 * self.parts * self.ranks * self._share(stage.start)
        if stage.last:
            whole += 4 * self.parts * self.tokens  # the losses of tokens, whose gradient is at hand
            if (drawn := len(self.inputs.drawn)) and self.model.loss.next_image:
                whole += 2 * self.parts * self.hidden + 2 * 4 * drawn
        return (self.parts - 1) / self.parts * whole

    def _exchanged(self) -> float:
        """What one layer's attention exchanges in a forward pass: queries, keys, values and its output."""
        language = self.model.language
        values = language.kv_heads // self.ranks
        heads = 2 * language.heads // self.ranks + 2 * max(values, self.parts)
        return heads * self.hidden / language.heads

    def _seen(self) -> tuple[float, float]:
        """Tokens and maps of the images of a context-parallel rank's share, filled up as it is."""
        vision, ranks = self.model.vision, self.ranks * self.parts
        images = self.ranks * max(-(-len(self.inputs.images) // ranks), 1)
        tokens = vision.resampler.queries * self.model.language.width
        return images * tokens * self.width, images * self.positions * vision.width * self.width

    def pipeline(self) -> float:
        """Over the pipeline: payloads, and the three numbers of each one's shape."""
        stage = self.stage.stage
        borders = [] if stage.last else [stage.stop]
        borders += [] if stage.first else [stage.start]
        row = self.model.language.width * self.width
        hidden = self.hidden // (self.ranks if self.config.parallel.sequence else 1)
        return sum(hidden + -(-self._share(border) // row) * row + 3 * 8 for border in borders)

    def _share(self, border: int) -> int:
        """Bytes of the maps that this rank carries over the border before a layer."""
        route = payload.route(self.inputs, self.model, self.stage.shapes, border)
        return route.share * self.model.vision.width * self.width

    def _layer(self, mmfs: bool) -> tuple[float, float]:
        """Forward and backward: self-attention and MLP are each a column- and a row-parallel layer."""
        column, row = self._column(not self.model.language.frozen), self._row()
        forward, backward = (2 * (a + b) for a, b in zip(column, row, strict=True))
        if mmfs:
            of_mmfs = self._mmfs()
            forward, backward = forward + of_mmfs[0], backward + of_mmfs[1]
        return forward, backward

    def _column(self, trained: bool = True) -> tuple[float, float]:
        """A column-parallel layer on the hidden states. Under sequence parallelism they are gathered, once
        more for the gradient of the weights, and their own gradient is scattered."""
        if not self.config.parallel.sequence:
            return 0.0, self.reduce(self.hidden)
        return self.part(self.hidden), (1 + trained) * self.part(self.hidden)

    def _row(self) -> tuple[float, float]:
        """A row-parallel layer on the hidden states."""
        if not self.config.parallel.sequence:
            return self.reduce(self.hidden), 0.0
        return self.part(self.hidden), self.part(self.hidden)

    def _mmfs(self) -> tuple[float, float]:
        """MMFS of one layer, its norm of the maps besides, whose weight's gradient is summed."""
        mmfs, norm = self.model.language.mmfs, self.reduce(self.model.vision.width * self.width)
        dense = mmfs.kind == "dense"
        if self.config.parallel.mmfs == "queries":
            positions = sum(
                height * width
                for level, (height, width) in enumerate(self.stage.shapes)
                if level in mmfs.levels
            )
            values = len(self.inputs.images) * positions * mmfs.value_width * self.width * (1 + dense)
            return self.part(values), self.part(values) + norm
        (down, down_back), (up, up_back) = self._column(), self._row()
        rows = 0 if dense else self.tokens + mmfs.table_rows
        projected = rows * mmfs.heads * mmfs.points * (2 + len(mmfs.levels)) * self.width
        return down + up + self.part(projected), down_back + up_back + self.part(projected) + norm

    def _first(self) -> float:
        """Embeddings, which are summed and under sequence parallelism divided, and the images' tokens and
        maps, which are gathered."""
        sent = self.reduce(self.hidden)
        if self.config.parallel.sequence:
            sent += self.part(self.hidden)
        if not self.config.parallel.shard_images:
            maps = self.positions * self.model.vision.width * self.width
            return sent + self.reduce(max(len(self.inputs.images), 1) * maps)
        tokens, all_maps = self._seen()
        return sent + self.part(tokens) + 2 * self.part(all_maps)

    def _last(self) -> float:
        """The head, whose input's gradient is summed; three numbers a token of the cross-entropy; the
        hidden states' gradient of the drawn images, and their losses."""
        tokens, drawn = self.tokens, len(self.inputs.drawn)
        sent = self.reduce(self.hidden) + 3 * self.reduce(4 * tokens)
        if self.config.parallel.sequence:
            sent += self.part(self.hidden)
        if self.model.language.train_image_tokens:
            sent += self.reduce(2 * 4 * tokens)
        if self.config.parallel.shard_images and drawn and self.model.loss.next_image:
            sent += self.reduce(self.hidden) + self.reduce(4 * drawn)
        return sent
