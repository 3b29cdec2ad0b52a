"""Between the plain language model's tensors and a tensor-parallel rank's parameters.

Both directions go through one table of rules, so what is loaded is what is exported. Work is done
layer by layer: no rank ever holds the whole plain model because of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from mmi_megatron.config import LanguageConfig
from mmi_megatron.model.language_model import DecoderLayer, LanguageModel, has_mmfs
from mmi_megatron.parallel.language_model import ShardedLanguageModel


@dataclass(frozen=True)
class Rule:
    """How one parameter is made of plain tensors.

    Attributes:
        plain: names of the plain tensors.
        join: plain tensors to the whole sharded parameter's pieces, one a rank, given the ranks.
        part: a whole parameter from the ranks' pieces, as a list of the plain tensors.
    """

    plain: tuple[str, ...]
    join: Callable[[list[Tensor], int], list[Tensor]]
    part: Callable[[list[Tensor]], list[Tensor]]


def _whole(name: str) -> Rule:
    return Rule((name,), lambda tensors, ranks: tensors * ranks, lambda pieces: pieces[:1])


def _split(name: str, dim: int) -> Rule:
    return Rule(
        (name,),
        lambda tensors, ranks: list(tensors[0].chunk(ranks, dim)),
        lambda pieces: [torch.cat(pieces, dim)],
    )


def _qkv(prefix: str, config: LanguageConfig, kind: str = "weight") -> Rule:
    """Megatron stores, for each key/value head, its queries, then its key, then its value."""
    groups, width = config.kv_heads, config.width // config.heads
    sizes = [config.heads // groups * width, width, width]

    def join(tensors: list[Tensor], ranks: int) -> list[Tensor]:
        grouped = [tensor.unflatten(0, (groups, -1)) for tensor in tensors]
        return list(torch.cat(grouped, 1).flatten(0, 1).chunk(ranks))

    def part(pieces: list[Tensor]) -> list[Tensor]:
        grouped = torch.cat(pieces).unflatten(0, (groups, -1))
        return [tensor.flatten(0, 1) for tensor in grouped.split(sizes, 1)]

    return Rule(tuple(f"{prefix}{name}_proj.{kind}" for name in "qkv"), join, part)


def _gated(prefix: str) -> Rule:
    """A rank's slice of the gate, then the same slice of the up projection."""

    def join(tensors: list[Tensor], ranks: int) -> list[Tensor]:
        return [torch.cat(pair) for pair in zip(*(t.chunk(ranks) for t in tensors), strict=True)]

    def part(pieces: list[Tensor]) -> list[Tensor]:
        gates, ups = zip(*(piece.chunk(2) for piece in pieces), strict=True)
        return [torch.cat(gates), torch.cat(ups)]

    return Rule((f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight"), join, part)


def layer_rules(config: LanguageConfig, mmfs: bool, divide: str = "heads") -> dict[str, Rule]:
    """Rules of one layer: the sharded parameter's name to its rule.

    Args:
        config: of the language model.
        mmfs: whether the layer holds MMFS.
        divide: what of MMFS is divided, see ``ShardedMMFS``.
    """
    rules = {
        "input_layernorm.weight": _whole("input_layernorm.weight"),
        "self_attention.linear_qkv.weight": _qkv("self_attn.", config),
        "self_attention.linear_proj.weight": _split("self_attn.o_proj.weight", 1),
        "pre_mlp_layernorm.weight": _whole("post_attention_layernorm.weight"),
        "mlp.linear_fc1.weight": _gated("mlp."),
        "mlp.linear_fc2.weight": _split("mlp.down_proj.weight", 1),
    }
    if config.qkv_bias:
        rules["self_attention.linear_qkv.bias"] = _qkv("self_attn.", config, "bias")
    if mmfs:
        source, target = "mmfs.attention.", "cross_attention."

        def of_queries(name: str, dim: int) -> Rule:
            return _split(name, dim) if divide == "heads" else _whole(name)

        rules |= {
            "cross_attn_bda.gate": _whole("mmfs.gate"),
            "pre_cross_attn_layernorm.weight": _whole("mmfs.norm_query.weight"),
            target + "norm_maps.weight": _whole("mmfs.norm_maps.weight"),
            target + "query_proj.weight": of_queries(source + "query_proj.weight", 0),
            target + "query_proj.bias": of_queries(source + "query_proj.bias", 0),
            target + "table": of_queries(source + "table.weight", 1),
            target + "value_proj.weight": _split(source + "value_proj.weight", 0),
            target + "value_proj.bias": _split(source + "value_proj.bias", 0),
            target + "sink_value": of_queries(source + "sink_value", 0),
            target + "output_proj.weight": of_queries(source + "output_proj.weight", 1),
            target + "output_proj.bias": _whole(source + "output_proj.bias"),
        }
        if config.mmfs.kind == "dense":
            rules |= {
                target + f"key_proj.{part}": _split(f"{source}key_proj.{part}", 0)
                for part in ("weight", "bias")
            }
        else:
            for name in ("offsets", "logits"):
                rules[f"{target}{name}_weight"] = of_queries(f"{source}{name}.weight", 1)
                rules[f"{target}{name}_bias"] = of_queries(f"{source}{name}.bias", 0)
    return rules


def outer_rules(config: LanguageConfig, first: bool = True, last: bool = True) -> dict[str, Rule]:
    """Rules of what lies around the layers, in the first and in the last pipeline stage."""
    rules, tokens = {}, []
    if first:
        rules["embedding.weight"] = _split("embed_tokens.weight", 0)
        tokens += ["embedding"]
    if last:
        rules["decoder.final_layernorm.weight"] = _whole("norm.weight")
        rules["output_layer.weight"] = _split("lm_head.weight", 0)
        tokens += ["head.weight", "head.bias"]
    if config.train_image_tokens:
        rules |= {f"image_tokens.{name}": _whole(f"image_tokens.{name}") for name in tokens}
    return rules


def _parts(model: ShardedLanguageModel) -> Iterator[tuple[str, str, dict[str, Rule]]]:
    """Prefix in this rank's and in the plain model, and the rules there."""
    yield "", "", outer_rules(model.language, model.stage.first, model.stage.last)
    for index, layer in enumerate(model.stage.layers):
        rules = layer_rules(model.language, has_mmfs(model.language, layer), model.mmfs_divide)
        yield f"decoder.layers.{index}.", f"layers.{layer}.", rules


def plain_names(config: LanguageConfig) -> set[str]:
    """Names of all the plain model's tensors."""
    names = {name for rule in outer_rules(config).values() for name in rule.plain}
    for layer in range(config.layers):
        for rule in layer_rules(config, has_mmfs(config, layer)).values():
            names |= {f"layers.{layer}.{name}" for name in rule.plain}
    return names


@torch.no_grad()
def load_plain(model: ShardedLanguageModel, plain: dict[str, Tensor]) -> None:
    """Fill the sharded model, or this stage of it, from the plain one's state dict.

    Raises:
        KeyError: when a plain tensor is missing; ValueError: when a shape differs or one is left over.
    """
    if unknown := set(plain) - plain_names(model.language):
        raise ValueError(f"plain tensors that the model has no place for: {sorted(unknown)[:8]}")
    for prefix, source, rules in _parts(model):
        tensors = {
            name.removeprefix(source): tensor for name, tensor in plain.items() if name.startswith(source)
        }
        _fill(model, prefix, rules, tensors)


def _fill(model: nn.Module, prefix: str, rules: dict[str, Rule], tensors: dict[str, Tensor]) -> None:
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    parameters = dict(model.named_parameters())
    for name, rule in rules.items():
        piece = rule.join([tensors[plain] for plain in rule.plain], ranks)[rank]
        parameter = parameters[prefix + name]
        if piece.shape != parameter.shape:
            raise ValueError(f"{prefix}{name}: expected {tuple(parameter.shape)}, got {tuple(piece.shape)}")
        parameter.copy_(piece)


def gather_plain(
    model: ShardedLanguageModel,
    of: Callable[[nn.Parameter], Tensor | None] = lambda parameter: parameter.data,
) -> dict[str, Tensor]:
    """The plain tensors from the tensor-parallel ranks' parameters, the same on each (collective); of
    a pipeline stage, those it holds.

    Args:
        model: the sharded model or a stage of it.
        of: what is gathered of a parameter, of its shape: its value, or its gradient. None leaves
            the parameter out.
    """
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    group = parallel_state.get_tensor_model_parallel_group()
    parameters = dict(model.named_parameters())
    plain: dict[str, Tensor] = {}
    for prefix, target, rules in _parts(model):
        for name, rule in rules.items():
            piece = of(parameters[prefix + name])
            if piece is None:
                continue
            pieces = [torch.empty_like(piece) for _ in range(ranks)]
            dist.all_gather(pieces, piece.contiguous(), group=group)
            for plain_name, tensor in zip(rule.plain, rule.part(pieces), strict=True):
                plain[target + plain_name] = tensor.clone()
    return plain


@torch.no_grad()
def initialise(model: ShardedLanguageModel, seed: int) -> None:
    """Start values of the plain twin, built layer by layer: the same model at any layout."""
    for prefix, source, rules in _parts(model):
        layer = int(source.split(".")[1]) if source else -1
        with torch.random.fork_rng():
            torch.manual_seed(seed * 100_003 + layer + 1)
            twin: nn.Module
            if source:
                twin = DecoderLayer(model.language, layer, model.maps_width, model.shapes)
            else:
                twin = LanguageModel.outer(model.language, model.boi, model.image)
        _fill(model, prefix, rules, dict(twin.named_parameters()))
