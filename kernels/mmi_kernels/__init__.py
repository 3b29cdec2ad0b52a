"""Deformable-attention operators for MM-Interleaved."""

from mmi_kernels.ops import mmfs_attention, ms_deform_attn

__all__ = ["mmfs_attention", "ms_deform_attn"]
