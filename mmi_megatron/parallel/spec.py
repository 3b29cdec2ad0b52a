"""The language model's layers as Megatron-Core module specs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from mmi_megatron.config import Config, LanguageConfig
from mmi_megatron.layout import stages
from mmi_megatron.model.attention import packed_attention
from mmi_megatron.model.language_model import has_mmfs
from mmi_megatron.parallel import context
from mmi_megatron.parallel.mmfs import GatedAdd, ShardedMMFS
from mmi_megatron.parallel.norm import RMSNorm
from mmi_megatron.platform import device, parameter_dtype

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
"""Megatron's settings for each way of ``train.recompute.language``."""


class Documents(PackedSeqParams):
    """Bounds of the spans that attend within themselves, as plain numbers.

    The format is named ``sbhd`` because the rotary table comes indexed by position already, so
    Megatron must not restart it per document once more.
    """

    def __init__(self, bounds: list[int]):
        super().__init__(qkv_format="sbhd")
        self.bounds = bounds


class PackedCoreAttention(MegatronModule):
    """Core attention of Megatron's SelfAttention for one stream of packed documents."""

    def __init__(self, config: TransformerConfig, **_):
        super().__init__(config=config)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: None = None,
        *,
        packed_seq_params: Documents,
    ) -> Tensor:
        """[t, 1, heads, width] each (fewer heads in key and value with grouped queries) to
        [t, 1, heads * width]; t of the stream's tokens are this context-parallel rank's."""
        query, key, value = context.by_heads(query[:, 0], key[:, 0], value[:, 0])
        out = context.by_tokens(packed_attention(query, key, value, packed_seq_params.bounds))
        return out.flatten(1).unsqueeze(1)


def transformer_config(config: Config) -> TransformerConfig:
    """Megatron's configuration of the language model."""
    language, parallel = config.model.language, config.parallel
    dtype = parameter_dtype(config.train.precision)
    layers = [["decoder"] * len(stage.layers) for stage in stages(config)]
    layers[0].insert(0, "embedding")
    layers[-1].append("loss")
    return TransformerConfig(
        num_layers=language.layers,
        hidden_size=language.width,
        ffn_hidden_size=language.ffn,
        num_attention_heads=language.heads,
        num_query_groups=language.kv_heads,
        kv_channels=language.width // language.heads,
        normalization="RMSNorm",
        layernorm_epsilon=language.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=language.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        pipeline_model_parallel_layout=layers if parallel.pipeline > 1 else None,
        # Stages tell each other the shape of every payload; Megatron allows that with this setting of
        # its experts only, of which there are none.
        variable_seq_lengths=parallel.pipeline > 1,
        moe_token_dispatcher_type="alltoall",
        # Interleaved stages cross messages in silence with the batched exchange.
        overlap_p2p_comm=parallel.virtual > 1,
        batch_p2p_comm=False,
        # Where sending overlaps, Megatron would give up an output's memory before it has been sent, and
        # gloo would send whatever comes to lie there.
        deallocate_pipeline_outputs=parallel.pipeline > 1 and parallel.virtual == 1,
        sequence_parallel=parallel.sequence,
        context_parallel_size=parallel.context,
        cp_comm_type="a2a" if parallel.context > 1 else None,
        expert_tensor_parallel_size=1,
        use_cpu_initialization=device().type == "cpu",
        # The plain twin's start values are loaded later; what is wanted of Megatron's own is that it
        # marks which parameters are divided, for the norm of the gradients.
        init_method=nn.init.zeros_,
        output_layer_init_method=nn.init.zeros_,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=config.train.precision == "bf16",
        calculate_per_token_loss=True,
        hetereogenous_dist_checkpoint=True,
        **RECOMPUTE[config.train.recompute.language],
    )


def _layer_spec(
    language: LanguageConfig, layer: int, maps_width: int, shapes, mmfs_divide: str
) -> ModuleSpec:
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=PackedCoreAttention,
            linear_proj=RowParallelLinear,
        ),
    )
    mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    submodules = TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=attention,
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=RMSNorm,
        mlp=mlp,
        mlp_bda=get_bias_dropout_add,
    )
    if has_mmfs(language, layer):
        submodules.pre_cross_attn_layernorm = RMSNorm
        submodules.cross_attention = ModuleSpec(
            module=ShardedMMFS,
            params={
                "mmfs": language.mmfs,
                "maps_width": maps_width,
                "shapes": shapes,
                "divide": mmfs_divide,
            },
        )
        submodules.cross_attn_bda = ModuleSpec(module=GatedAdd)
    return ModuleSpec(module=TransformerLayer, submodules=submodules)


def block_spec(
    language: LanguageConfig, maps_width: int, shapes, layers: Iterable[int], mmfs_divide: str = "heads"
) -> TransformerBlockSubmodules:
    """Specs of some layers, counted from 0: MMFS in the cross-attention slot of every
    ``mmfs_every``-th."""
    specs = [_layer_spec(language, layer, maps_width, shapes, mmfs_divide) for layer in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)
