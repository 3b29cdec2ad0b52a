"""A run of the whole model at any layout, for the tests that compare layouts.

Weights are random everywhere, gates, gammas, zero convolutions, offsets and tables included, so that
no path hides behind a zero. ``run`` is called on the ranks of ``tests.ranks.Ranks``.
"""

from __future__ import annotations

import hashlib
import pkgutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from data_pipeline.batch import IGNORED, Batch
from data_pipeline.rows import SpecialTokens
from mmi_megatron.config import Config, RecomputeConfig

SEED = 12
"""Of the noise. With this one no scalar's gradient is a small difference of large terms, whose float32
rounding alone would be near the 1e-5 asked for; in the plain model it is 2.5e-6 at most."""
ROWS = 4


@dataclass(frozen=True)
class Layout:
    """A layout and what varies with it."""

    name: str
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    data: int = 1
    context: int = 1
    stages: tuple[int, ...] = ()
    sequence: bool = False
    shard_images: bool = True
    overlap: bool = True
    copies: int = 1
    recompute: tuple[str, str, str] = ("none", "none", "none")

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data * self.context

    def apply(self, config: Config) -> Config:
        """Set the layout in a configuration of one row a micro-batch."""
        parallel = config.parallel
        parallel.tensor, parallel.pipeline, parallel.virtual = self.tensor, self.pipeline, self.virtual
        parallel.stages, parallel.sequence, parallel.context = list(self.stages), self.sequence, self.context
        parallel.shard_images, parallel.overlap, parallel.bucket = self.shard_images, self.overlap, 20_000
        parallel.optimizer_copies = self.copies
        config.train.rows, config.train.micro_rows = ROWS, 1
        config.train.recompute = RecomputeConfig(*self.recompute)
        return config


@dataclass
class Steps:
    """What is trained on: ``ROWS`` micro-batches of one row for each step."""

    special: SpecialTokens
    batches: list[list[Batch]]


@dataclass
class Result:
    """What one rank found.

    Attributes:
        place: (tensor, pipeline, data, context) rank.
        gradients: of step 1, by the plain model's names; of this rank's stages.
        record: next-token loss, next-image loss and gradient norm of each step.
        parameters: name and whether it is divided over tensor parallelism, and the SHA-256 of its end.
        grad_elements: of this rank's gradient buffers.
    """

    place: tuple[int, int, int, int]
    gradients: dict[str, torch.Tensor]
    record: list[tuple[float, float, float]]
    parameters: dict[tuple[str, bool], str] = field(default_factory=dict)
    grad_elements: int = 0


def matrix_config(frozen: bool, vocabulary: int) -> Config:
    """The small configuration at sizes that divide by four.

    Adam's eps is well above the rounding of gradients. With the usual 1e-6 an entry whose gradient is
    little more than rounding moves as far as any other, and after eight steps the plain model in float32
    has a gradient norm 7e-5 from its own in float64: no layout could be held to 1e-5.
    """
    from tests.samples import small_config

    config = small_config(frozen=frozen)
    config.model.language.kv_heads = 4
    config.model.language.vocabulary = vocabulary
    config.data.context_length = 160
    config.optimizer.eps = 1e-3
    return config


def story_steps(folder: Path, steps: int) -> tuple[Steps, int]:
    """Steps of the storybook, and its vocabulary; the first step's last row and the second step's
    first hold no image."""
    from data_pipeline.stream import Stream
    from data_pipeline.tokens import load_tokenizer
    from tests.small_run import story_config

    config = story_config(folder)
    special = load_tokenizer(config.data.tokenizer).special
    stream = Stream(config.data, "train", global_rows=ROWS)
    batches = [stream.next().batches(0, 1, 1, ROWS) for _ in range(steps)]
    for step, row in ((0, ROWS - 1), (1, 0)):
        batches[step][row] = without_images(batches[step][row], special)
    return Steps(special, batches), config.model.language.vocabulary


def without_images(batch: Batch, special: SpecialTokens) -> Batch:
    """A row of one document of the same length that is all text."""
    length = len(batch.tokens)
    tokens = np.random.default_rng(0).integers(6, 60, length).astype(np.int32)
    tokens[0], tokens[-1] = special.bos, special.eos
    none = batch.images[:0]
    return Batch(
        tokens=tokens,
        labels=np.append(tokens[1:], np.int32(IGNORED)).astype(np.int32),
        row_starts=np.array([0, length], np.int32),
        cu_seqlens=np.array([0, length], np.int32),
        source=batch.source[:1],
        sample_ids=batch.sample_ids[:1],
        images=none,
        image_ids=batch.image_ids[:0],
        drawn=batch.drawn[:0],
        drawn_index=batch.drawn_index[:0],
    )


def randomise(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A value that depends on the parameter's name alone.

    Sampling offsets are random by their biases and vary little with the query. Bilinear sampling has a
    kink at every pixel line: a sample that the rounding of its query puts on one side or the other
    changes that gradient by percents, in float32 and whatever the layout.
    """
    generator = torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31)
    noise = torch.randn(tensor.shape, generator=generator)
    if "norm" in name and name.endswith("weight") and tensor.ndim == 1:
        return 1 + 0.1 * noise
    scale = 0.02 if name.endswith("offsets.weight") else 1.0
    return noise * 0.2 if tensor.ndim < 2 else scale * noise / tensor[0].numel() ** 0.5


def plain_model(config: Config, special: SpecialTokens):
    """The whole model around the plain language model, with random weights."""
    from mmi_megatron.model.image_decoder import ImageDecoder
    from mmi_megatron.model.language_model import LanguageModel
    from mmi_megatron.model.mm_interleaved import MMInterleaved
    from mmi_megatron.model.visual_tokenizer import VisualTokenizer

    torch.manual_seed(0)
    model = config.model
    tokenizer = VisualTokenizer(model.vision, model.language.width)
    language = LanguageModel(model.language, model.vision.width, tokenizer.shapes, special.boi, special.image)
    decoder = ImageDecoder(model.decoder, model.language.width, model.vision.width, tokenizer.shapes)
    whole = MMInterleaved(model, language, tokenizer, decoder)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            parameter.copy_(randomise(name, parameter))
    return whole


def load_random(stages, twin) -> None:
    """Give this rank's stages the plain model's weights."""
    from mmi_megatron.parallel.plain import load_plain

    for stage in stages:
        load_plain(stage.language_model, twin.language_model.state_dict())
        for name in ("visual_tokenizer", "image_decoder"):
            if (part := getattr(stage, name)) is not None:
                part.load_state_dict(getattr(twin, name).state_dict())


def counts_of(batches: list[Batch]) -> tuple[int, int]:
    return sum(int((b.labels != IGNORED).sum()) for b in batches), sum(len(b.drawn) for b in batches)


def plain_gradients(config: Config, steps: Steps) -> dict[str, torch.Tensor]:
    """Gradients of the first step by the plain model and autograd alone, in float64."""
    from mmi_megatron.model.mm_interleaved import prepare

    model, weights = plain_model(config, steps.special).double(), config.model.loss
    tokens, images = counts_of(steps.batches[0])
    for batch in steps.batches[0]:
        losses = model(prepare(batch, steps.special, config.model, torch.device("cpu")), SEED, 0)
        loss = weights.next_token * losses.tokens.sum() / tokens + losses.zero
        (loss + weights.next_image * losses.images.sum() / images).backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_gradients(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Each gradient to 1e-5 of its largest entry. A bias on the keys of an attention shifts all its
    logits alike, so its gradient is zero but for rounding: it is only asked to stay that small."""
    assert got.keys() == want.keys(), sorted(got.keys() ^ want.keys())[:6]
    largest = {name: float(grad.abs().max()) for name, grad in want.items()}
    rounding = 1e-6 * max(largest.values())
    zero = {name for name, size in largest.items() if size < rounding}
    assert all("key" in name and name.endswith("bias") for name in zero), f"no gradient: {sorted(zero)}"
    for name, expected in want.items():
        error = float((got[name] - expected).abs().max())
        allowed = rounding if name in zero else 1e-5 * largest[name]
        assert error < allowed, f"{name}: {error / largest[name]:.2e} of its largest entry"


MUTATIONS = {
    # What stages behind the first border do with the maps is lost.
    "dropped map gradient": ("mmi_megatron.parallel.payload.unpack", "_unpack_dropping"),
    # The gate sees a part of the sequence on each rank, and nobody adds the parts up.
    "missing sum over tensor ranks": ("mmi_megatron.parallel.mmfs.GatedAdd.__init__", "_gate_unmarked"),
    # Noise by the rank that draws.
    "key by layout": ("mmi_megatron.model.image_decoder.ImageDecoder.draw_keys", "_keys_by_rank"),
    # Each context-parallel rank counts its tokens' positions from its first one.
    "positions without offset": ("mmi_megatron.parallel.language_model.rotary_angles", "_angles_from_zero"),
    # What is gathered from context-parallel ranks, hidden states, visual tokens and maps, keeps on each
    # the gradient of its own use alone.
    "gradient of other context ranks": ("mmi_megatron.parallel.context.gather", "_gather_alike"),
}


def _unpack_dropping(original):
    def unpack(*arguments):
        hidden, maps = original(*arguments)
        return hidden, maps.detach() + 0 * maps

    return unpack


def _gate_unmarked(original):
    def init(self, config):
        original(self, config)
        self.gate.sequence_parallel = False

    return init


def _keys_by_rank(original):
    def keys(self, ids, seed, step):
        return original(self, ids, seed + torch.distributed.get_rank(), step)

    return keys


def _angles_from_zero(original):
    return lambda position, width, theta: original(position - position[0], width, theta)


def _gather_alike(original):
    return lambda own_part, alike=False: original(own_part, alike=True)


def run(config: Config, steps: Steps, mutation: str = "") -> Result:
    """Train on this rank."""
    from mmi_megatron.parallel import groups

    with ExitStack() as stack:
        if mutation:
            where, name = MUTATIONS[mutation]
            stack.enter_context(mock.patch(where, globals()[name](pkgutil.resolve_name(where))))
        layout = groups.initialize(config)
        stack.callback(groups.destroy)
        return _train(config, layout, steps)


def build(config: Config, steps: Steps):
    """This rank's stages with random weights, wrapped, and their optimizer and its schedule."""
    from mmi_megatron.parallel.model import build_stages
    from mmi_megatron.train import optimizer as optimization

    stages = build_stages(config, steps.special)
    load_random(stages, plain_model(config, steps.special))
    wrapped = optimization.wrap_stages(stages, config)
    return wrapped, *optimization.build_optimizer(wrapped, config)


def train(config: Config, layout, parts, steps: Steps, first: int = 0) -> list[tuple[float, float, float]]:
    """Train on the steps, which count from ``first``; losses and gradient norm of each."""
    import torch.distributed as dist

    from mmi_megatron.model.mm_interleaved import prepare
    from mmi_megatron.parallel import schedule
    from mmi_megatron.train import optimizer as optimization

    (wrapped, optimizer, scheduler), record = parts, []
    for step, batches in enumerate(steps.batches, first):
        for chunk in wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        mine = batches[layout.dp_rank :: layout.dp_size]
        inputs = [prepare(batch, steps.special, config.model, torch.device("cpu")) for batch in mine]
        counts = counts_of(batches)
        sums = schedule.train_step(wrapped, inputs, config.model.loss, counts, SEED, step)
        sums = sums if layout.speaks else torch.zeros_like(sums)
        dist.all_reduce(sums)
        norm, skipped = optimization.finish(wrapped, optimizer)
        assert not skipped
        scheduler.step(increment=1)
        record.append((float(sums[0]) / counts[0], float(sums[1]) / counts[1], norm))
    optimization.gather_parameters(wrapped)
    return record


def _train(config: Config, layout, steps: Steps) -> Result:
    from mmi_megatron.train import optimizer as optimization

    parts = build(config, steps)
    result = Result((layout.tp_rank, layout.pp_rank, layout.dp_rank, layout.cp_rank), {}, [])
    buffers = [b for chunk in parts[0] for b in chunk.buffers + chunk.expert_parallel_buffers]
    result.grad_elements = sum(buffer.grad_data.numel() for buffer in buffers)
    finalize = optimization.finalize_model_grads

    def and_keep(chunks) -> None:
        finalize(chunks)
        if not result.gradients:
            result.gradients = _gradients(chunks)

    with mock.patch.object(optimization, "finalize_model_grads", and_keep):
        result.record = train(config, layout, parts, steps)
    result.parameters = _hashes(chunk.module for chunk in parts[0])
    return result


def _gradients(chunks) -> dict[str, torch.Tensor]:
    """Reduced gradients of this rank's stages, whole, by plain names (collective). The distributed
    optimizer leaves each rank with its shard of them; here they come together."""
    import torch.distributed as dist

    from mmi_megatron.parallel.plain import gather_plain

    found = {}
    for chunk in chunks:
        whole = {}
        pairs = (
            (chunk.buffers, chunk.intra_dp_cp_group),
            (chunk.expert_parallel_buffers, chunk.intra_expt_dp_group),
        )
        for buffers, group in pairs:
            for bucket in (bucket for buffer in buffers for bucket in buffer.buckets):
                # The shards of other ranks hold leftovers; they are replaced in a copy.
                shards = [torch.empty_like(shard) for shard in bucket.grad_data.chunk(group.size())]
                dist.all_gather(shards, bucket.grad_data.chunk(group.size())[group.rank()].clone(), group)
                whole[bucket] = torch.cat(shards)
        buckets = {parameter: bucket for bucket in whole for parameter in bucket.params}

        def gradient(parameter, whole=whole, buckets=buckets):
            if parameter not in buckets:
                return None
            bucket, grad = buckets[parameter], parameter.main_grad
            start = grad.storage_offset() - bucket.grad_data.storage_offset()
            return whole[bucket][start : start + grad.numel()].view(grad.shape)

        plain = gather_plain(chunk.module.language_model, gradient)
        found |= {f"language_model.{name}": tensor for name, tensor in plain.items()}
        for name, parameter in chunk.module.named_parameters():
            if not name.startswith("language_model.") and parameter.requires_grad:
                found[name] = gradient(parameter).clone()
    return found


def _hashes(stages) -> dict[tuple[str, bool], str]:
    """SHA-256 of every parameter of this rank's stages."""
    hashes = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            language = name.startswith("language_model.")
            divided = language and getattr(parameter, "tensor_model_parallel", False)
            key = f"{stage.stage.index}.{name}", divided
            hashes[key] = hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest()
    return hashes


# Checkpoints


def states_of(optimizer) -> list[dict[str, torch.Tensor]]:
    """This rank's shards of the optimizer's state, Adam's step included, in the optimizer's order."""
    from mmi_megatron.train.optimizer import parts

    found = []
    for part in parts(optimizer):
        inner = part.optimizer
        for parameter in (parameter for group in inner.param_groups for parameter in group["params"]):
            state = {"value": parameter.detach(), **inner.state.get(parameter, {})}
            found.append({name: torch.as_tensor(value).clone() for name, value in state.items()})
    return found


def train_and_save(config: Config, steps: Steps, folder: Path, at: int):
    """Train ``at`` steps, save, and train on; the record after the save, and the state saved."""
    from mmi_megatron.parallel import groups
    from mmi_megatron.train import checkpoint

    layout = groups.initialize(config)
    try:
        parts = build(config, steps)
        train(config, layout, parts, Steps(steps.special, steps.batches[:at]))
        states = states_of(parts[1])
        checkpoint.save(*parts, {}, folder, step=at)
        return train(config, layout, parts, Steps(steps.special, steps.batches[at:]), at), states
    finally:
        groups.destroy()


def load_and_train(config: Config, steps: Steps, folder: Path, at: int, again: Path | None = None):
    """Load, save to ``again`` if given, and train on; the record, and the state loaded."""
    from mmi_megatron.parallel import groups
    from mmi_megatron.train import checkpoint

    layout = groups.initialize(config)
    try:
        parts = build(config, steps)
        for parameter in (p for chunk in parts[0] for p in chunk.module.parameters()):
            parameter.data.zero_()  # what is not loaded must not be right by chance
        checkpoint.load(*parts, checkpoint.latest(folder))
        states = states_of(parts[1])
        if again is not None:
            checkpoint.save(*parts, {}, again, step=at)
        return train(config, layout, parts, Steps(steps.special, steps.batches[at:]), at), states
    finally:
        groups.destroy()
