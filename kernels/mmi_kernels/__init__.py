"""Deformable-attention operators for MM-Interleaved.

Importing loads the compiled operators if they have been built (``python -m mmi_kernels.build``);
otherwise a PyTorch reference runs, with one warning. ``status()`` says which.
"""

from mmi_kernels import autograd, library
from mmi_kernels.library import status

if library.load():
    autograd.register()

from mmi_kernels.ops import intervals, mmfs_attention, ms_deform_attn

__all__ = ["intervals", "mmfs_attention", "ms_deform_attn", "status"]
