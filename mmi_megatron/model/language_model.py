"""LLaMA with MMFS in plain PyTorch.

The twin of the sharded model in ``parallel/``: it defines the parameters' names (those of
transformers' LlamaForCausalLM), their start values and the mathematics, runs generation with a
key/value cache, and is what the sharded model is tested against.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmi_megatron.config import LanguageConfig
from mmi_megatron.model.attention import cached_attention, packed_attention, rotary_angles, rotate
from mmi_megatron.model.mmfs import MMFS, select_levels

INIT_STD = 0.02
IMAGE_TOKEN_BIAS = -5.0
"""Start of the output bias of the two image tokens: rare until trained (the release's 95 - 100)."""


@dataclass
class Visibility:
    """What the tokens of a stream see.

    Attributes:
        position: int64 [T], position in the document.
        bounds: offsets of the spans within which tokens attend to each other, from 0 to T.
        visible: int32 [T, 2], half-open interval of images each token sees.
    """

    position: Tensor
    bounds: list[int]
    visible: Tensor


@dataclass
class Cache:
    """What a document has left behind: keys and values of its tokens, [T, kv_heads, head_width] a
    layer, and its images as MMFS has projected them, [images, ...] a layer with MMFS."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    projected: dict[int, Tensor] = field(default_factory=dict)
    images: int = 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, bounds: list[int]) -> Tensor:
        """Append new tokens to a layer's keys and values; what they find in all of them."""
        if layer == len(self.keys):
            self.keys.append(key)
            self.values.append(value)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], key])
            self.values[layer] = torch.cat([self.values[layer], value])
        return cached_attention(query, self.keys[layer], self.values[layer])

    def append(self, layer: int, projected: Tensor) -> Tensor:
        """Append images to those that a layer has projected, and return all of them."""
        if layer in self.projected:
            projected = (
                torch.cat([self.projected[layer], projected]) if len(projected) else self.projected[layer]
            )
        self.projected[layer] = projected
        return projected

    def clone(self) -> Cache:
        """A cache that can be extended without changing this one (for beams)."""
        return Cache(list(self.keys), list(self.values), dict(self.projected), self.images)


class Beams(Cache):
    """Caches of several continuations of one document, read together: a span of the stream each."""

    def __init__(self, caches: list[Cache]):
        super().__init__(projected=caches[0].projected, images=caches[0].images)
        self.caches = caches

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, bounds: list[int]) -> Tensor:
        spans = zip(self.caches, bounds[:-1], bounds[1:], strict=True)
        found = [c.attend(layer, query[a:b], key[a:b], value[a:b], [0, b - a]) for c, a, b in spans]
        return torch.cat(found)


class Attention(nn.Module):
    """Multi-head or grouped-query self-attention with rotary positions."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        width = config.width // config.heads
        self.head_width = width
        self.q_proj = nn.Linear(config.width, config.heads * width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, config.kv_heads * width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, config.kv_heads * width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.heads * width, config.width, bias=False)

    def forward(
        self, x: Tensor, angles: Tensor, bounds: list[int], cache: Cache | None, layer: int
    ) -> Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_width))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, angles), rotate(key, angles)
        if cache is None:
            out = packed_attention(query, key, value, bounds)
        else:
            out = cache.attend(layer, query, key, value, bounds)
        return self.o_proj(out.flatten(1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.ffn, bias=False)
        self.up_proj = nn.Linear(config.width, config.ffn, bias=False)
        self.down_proj = nn.Linear(config.ffn, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GatedMMFS(nn.Module):
    """h + tanh(gate) * MMFS(RMSNorm(h), RMSNorm(maps)); the gate starts at 0 (section 3.2)."""

    def __init__(self, config: LanguageConfig, maps_width: int, shapes: tuple[tuple[int, int], ...]):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))
        self.norm_query = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.norm_maps = nn.RMSNorm(maps_width, eps=config.norm_eps)
        self.attention = MMFS(config.width, maps_width, config.width, config.mmfs, shapes)

    def forward(
        self, hidden: Tensor, maps: Tensor, visible: Tensor, cache: Cache | None, layer: int
    ) -> Tensor:
        projected = self.attention.project(self.norm_maps(maps))
        if cache is not None:
            projected = cache.append(layer, projected)
        centre = hidden.new_full((1, 2), 0.5, dtype=torch.float32)
        seen = self.attention.attend(self.norm_query(hidden), projected, centre, visible)
        return hidden + torch.tanh(self.gate) * seen


def has_mmfs(config: LanguageConfig, layer: int) -> bool:
    """Whether a layer (from 0) holds MMFS."""
    return config.mmfs.kind != "none" and layer % config.mmfs_every == 0


class DecoderLayer(nn.Module):
    """Self-attention, then MMFS in some layers, then the MLP, each with its residual."""

    def __init__(self, config: LanguageConfig, layer: int, maps_width: int, shapes):
        super().__init__()
        self.layer = layer
        self.input_layernorm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.mmfs = GatedMMFS(config, maps_width, shapes) if has_mmfs(config, layer) else None
        self.post_attention_layernorm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config)
        for name, parameter in [*self.self_attn.named_parameters(), *self.mlp.named_parameters()]:
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=INIT_STD)
        # Residual branches start small, so that the sum of all of them does not grow with depth.
        for projection in (self.self_attn.o_proj, self.mlp.down_proj):
            nn.init.normal_(projection.weight, std=INIT_STD / (2 * config.layers) ** 0.5)

    def forward(self, hidden, angles, sees: Visibility, maps: Tensor | None, cache: Cache | None) -> Tensor:
        normed = self.input_layernorm(hidden)
        hidden = hidden + self.self_attn(normed, angles, sees.bounds, cache, self.layer)
        if self.mmfs is not None:
            hidden = self.mmfs(hidden, maps, sees.visible, cache, self.layer)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class LevelSelect:
    """The levels of the pyramid that the language model looks at, taken once for all its layers.

    ``inner`` is the configuration and the shapes as the layers see them, levels counted anew.
    """

    def __init__(self, config: LanguageConfig, shapes: tuple[tuple[int, int], ...]):
        self.shapes, self.levels = shapes, list(config.mmfs.levels)
        self.inner = config, shapes
        if config.mmfs.kind != "none" and shapes:
            mmfs = replace(config.mmfs, levels=list(range(len(self.levels))))
            self.inner = replace(config, mmfs=mmfs), tuple(shapes[level] for level in self.levels)

    def __call__(self, maps: Tensor) -> Tensor:
        return maps if self.inner[1] is self.shapes else select_levels(maps, self.shapes, self.levels)


def padded_vocabulary(config: LanguageConfig) -> int:
    """Rows of the vocabulary tables, the same at any layout."""
    multiple = config.vocabulary_multiple
    return -(-config.vocabulary // multiple) * multiple


class ImageTokens(nn.Module):
    """What is trained of a frozen language model's tables: BoI's embedding and the output rows of
    BoI and of the placeholder."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(config.width))
        self.head = nn.Linear(config.width, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, IMAGE_TOKEN_BIAS)


class LanguageModel(nn.Module):
    """The whole language model.

    Args:
        config: sizes.
        maps_width: channels of the images' feature maps.
        shapes: (height, width) of the pyramid's levels.
        boi, image: ids of the image tokens, used by ``config.train_image_tokens``.
    """

    def __init__(self, config: LanguageConfig, maps_width: int, shapes, boi: int, image: int):
        super().__init__()
        self.boi, self.image = boi, image
        self.select = LevelSelect(config, shapes)
        config, shapes = self.select.inner
        self.config = config
        rows = padded_vocabulary(config)
        self.embed_tokens = nn.Embedding(rows, config.width)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, maps_width, shapes) for layer in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.width, rows, bias=False)
        self.image_tokens = ImageTokens(config) if config.train_image_tokens else None
        nn.init.normal_(self.embed_tokens.weight, std=INIT_STD)
        nn.init.normal_(self.lm_head.weight, std=INIT_STD)

    @classmethod
    def outer(cls, config: LanguageConfig, boi: int, image: int) -> LanguageModel:
        """A model without its layers: tables, final norm and image tokens."""
        return cls(replace(config, layers=0), 0, (), boi, image)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [T, width] of tokens [T]; placeholders are overwritten by the caller."""
        embeddings = self.embed_tokens(tokens)
        if self.image_tokens is not None:
            is_boi = (tokens == self.boi)[:, None].to(embeddings.dtype)
            embeddings = embeddings + is_boi * self.image_tokens.embedding
        return embeddings

    def forward(
        self, embeddings: Tensor, sees: Visibility, maps: Tensor | None, cache: Cache | None = None
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            embeddings: [T, width].
            sees: structure of the stream (with a cache: of the new tokens).
            maps: [I, S, maps_width], or None without MMFS.
            cache: of the tokens before, extended in place; of ``maps`` only the images that it does
                not hold yet are projected.

        Returns:
            [T, width].
        """
        angles = rotary_angles(sees.position, self.config.width // self.config.heads, self.config.rope_theta)
        hidden = embeddings
        if cache is not None and maps is not None:
            maps, cache.images = maps[cache.images :], len(maps)
        maps = None if maps is None else self.select(maps)
        for layer in self.layers:
            hidden = layer(hidden, angles, sees, maps, cache)
        return self.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [T, vocabulary] from hidden states [T, width], without the padded rows."""
        logits = self.lm_head(hidden)[:, : self.config.vocabulary].float()
        if self.image_tokens is not None:
            where = torch.tensor([self.boi, self.image], device=hidden.device)
            logits = logits.index_copy(1, where, self.image_tokens.head(hidden).float())
        return logits

    def token_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy float32 [T] (equation 2), 0 where the label is ignored."""
        return F.cross_entropy(self.logits(hidden), labels, reduction="none")

    def freeze(self) -> None:
        """Leave only MMFS and the image tokens to be trained."""
        self.requires_grad_(False)
        for layer in self.layers:
            if layer.mmfs is not None:
                layer.mmfs.requires_grad_(True)
        if self.image_tokens is not None:
            self.image_tokens.requires_grad_(True)
