"""A small model with one of everything the trainer must handle: tensor-parallel layers, a norm that
is the same on all ranks, modules whose images are divided over the ranks, offsets, a gate, a frozen
part; and a run of it on this rank. Imported on the ranks only."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, mappings
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import nn

from mmi_megatron.config import Config
from mmi_megatron.parallel import groups
from mmi_megatron.parallel.norm import RMSNorm
from mmi_megatron.platform import device, parameter_dtype
from mmi_megatron.train.optimizer import build_optimizer, finish, wrap

WIDTH, IMAGES = 8, 8


def tiny_config(tensor: int = 1, **changes) -> Config:
    """A configuration for the tiny model; ``changes`` are ``optimizer__lr=...`` and the like."""
    config = Config()
    config.parallel.tensor = tensor
    config.parallel.overlap = False  # `Run.backward` drives no schedule
    train, optimizer = config.train, config.optimizer
    train.steps, train.rows, train.micro_rows, train.precision, train.threads = 20, 4, 1, "fp32", 1
    train.timeout = 60
    optimizer.lr, optimizer.decoder_lr, optimizer.offsets_lr = 1e-2, 2e-3, 1e-3
    optimizer.warmup_steps = 2
    for key, value in changes.items():
        room, name = key.split("__")
        setattr(getattr(config, room), name, value)
    return config


class Vision(nn.Module):
    """Stands for the visual tokenizer: a projection, sampling offsets and a gate."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.offsets = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Parameter(torch.full((1,), 0.3))

    def forward(self, images):
        return self.proj(images) + torch.tanh(self.gate) * torch.sin(self.offsets(images))


class Tiny(MegatronModule):
    """images [IMAGES, WIDTH] -> losses; images are divided over the tensor-parallel group."""

    def __init__(self, config: TransformerConfig, train_language: bool = True):
        super().__init__(config=config)
        options = {"config": config, "bias": True, "skip_bias_add": False, "init_method": nn.init.zeros_}
        self.vision = Vision()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.norm = RMSNorm(config, WIDTH, 1e-6)
        self.up = ColumnParallelLinear(WIDTH, 2 * WIDTH, gather_output=False, **options)
        self.down = RowParallelLinear(2 * WIDTH, WIDTH, input_is_parallel=True, **options)
        self.image_decoder = nn.Linear(WIDTH, WIDTH)
        if not train_language:
            for part in (self.norm, self.up, self.down):
                part.requires_grad_(False)

    def forward(self, images):
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        mine = slice(
            *(len(images) // ranks * (parallel_state.get_tensor_model_parallel_rank() + i) for i in (0, 1))
        )
        seen = self.vision(images[mine])
        seen = mappings.gather_from_sequence_parallel_region(seen, tensor_parallel_output_grad=False)
        hidden = self.down(torch.tanh(self.up(self.norm(self.frozen(seen)))[0]))[0] + seen
        spread = mappings.copy_to_tensor_model_parallel_region(hidden)[mine]
        drawn = (self.image_decoder(spread) - images[mine].flip(-1)).float().square().sum()
        return hidden.float().square().sum() + 10 * mappings.reduce_from_tensor_model_parallel_region(drawn)

    def image_parts(self):
        return [self.vision, self.image_decoder]

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        sharded, group = {}, parallel_state.get_tensor_model_parallel_group()
        for name, child in self.named_children():
            sharded |= sharded_state_dict_default(child, f"{prefix}{name}.", sharded_offsets, metadata, group)
        own = dict(self.named_parameters(recurse=False))
        return sharded | make_sharded_tensors_for_checkpoint(own, prefix, {}, sharded_offsets)


def whole_values() -> dict[str, torch.Tensor]:
    """Start values of every parameter, undivided."""
    shapes = {
        "vision.proj.weight": (WIDTH, WIDTH), "vision.proj.bias": (WIDTH,), "vision.gate": (1,),
        "vision.offsets.weight": (WIDTH, WIDTH), "vision.offsets.bias": (WIDTH,),
        "frozen.weight": (WIDTH, WIDTH), "frozen.bias": (WIDTH,), "norm.weight": (WIDTH,),
        "up.weight": (2 * WIDTH, WIDTH), "up.bias": (2 * WIDTH,),
        "down.weight": (WIDTH, 2 * WIDTH), "down.bias": (WIDTH,),
        "image_decoder.weight": (WIDTH, WIDTH), "image_decoder.bias": (WIDTH,),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


DIVIDED = {"up.weight": 0, "up.bias": 0, "down.weight": 1}
"""Which dimension of which parameter is divided over the tensor-parallel group."""


def slice_of(name: str, whole: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole tensor."""
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    return whole.chunk(ranks, DIVIDED[name])[rank] if name in DIVIDED else whole


def whole_of(name: str, part: torch.Tensor) -> torch.Tensor:
    """The whole tensor from all ranks' parts (collective)."""
    if name not in DIVIDED:
        return part.clone()
    pieces = [torch.empty_like(part) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
    dist.all_gather(pieces, part.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(pieces, DIVIDED[name])


class Run:
    """The tiny model being trained on this rank; use as a context manager."""

    def __init__(self, config: Config, mark: bool = True, train_language: bool = True):
        self.config = config
        self.layout = groups.initialize(config)
        dtype = parameter_dtype(config.train.precision)
        model = Tiny(
            TransformerConfig(
                num_layers=1,
                hidden_size=WIDTH,
                num_attention_heads=2,
                params_dtype=dtype,
                bf16=dtype == torch.bfloat16,
                tensor_model_parallel_size=config.parallel.tensor,
                use_cpu_initialization=device().type == "cpu",
                calculate_per_token_loss=True,
                expert_tensor_parallel_size=1,
                gradient_accumulation_fusion=False,
                hetereogenous_dist_checkpoint=True,
                perform_initialization=False,
            ),  # fmt: skip
            train_language,
        )
        with torch.no_grad():
            values = whole_values()
            for name, parameter in model.named_parameters():
                parameter.copy_(slice_of(name, values[name]))
        config.parallel.shard_images = mark
        self.model = wrap(model.to(device=device(), dtype=dtype), config)
        self.optimizer, self.scheduler = build_optimizer(self.model, config)
        self.step = 0

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_) -> None:
        groups.destroy()

    def backward(self) -> float:
        """Forward and backward of one step in two micro-batches; the loss of the whole batch."""
        generator = torch.Generator().manual_seed(100 + self.step)
        images = torch.randn(4, IMAGES, WIDTH, generator=generator)  # four rows of the global batch
        mine = images.chunk(self.layout.dp_size)[self.layout.dp_rank]
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        total = torch.zeros(())
        for row in mine:
            loss = self.model(row.to(device(), parameter_dtype(self.config.train.precision))) / images.numel()
            loss.backward()
            total += loss.detach().cpu()
        summed = total.to(device())
        dist.all_reduce(summed, group=parallel_state.get_data_parallel_group())
        return float(summed)

    def train(self, steps: int) -> list[tuple[float, float]]:
        """Loss and gradient norm of each of the next ``steps`` steps."""
        results = []
        for _ in range(steps):
            loss = self.backward()
            norm, skipped = finish(self.model, self.optimizer)
            assert not skipped
            self.scheduler.step(increment=1)
            self.step += 1
            results.append((loss, norm))
        return results

    def gradients(self) -> dict[str, torch.Tensor]:
        """Reduced gradients of all parameters, whole, after ``finish`` (collective)."""
        pairs = (
            (self.model.buffers, self.model.intra_dp_cp_group),
            (self.model.expert_parallel_buffers, self.model.intra_expt_dp_group),
        )
        for buffers, group in pairs:
            for bucket in (bucket for buffer in buffers for bucket in buffer.buckets):
                # Only this rank's shard has been reduced; put the ranks' shards together.
                shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)
        named = self.model.module.named_parameters()
        return {name: whole_of(name, p.main_grad) for name, p in named if p.requires_grad}

    def parameters(self) -> dict[str, torch.Tensor]:
        """All parameters, whole (collective)."""
        return {name: whole_of(name, p.detach()) for name, p in self.model.module.named_parameters()}
