"""The released MM-Interleaved checkpoint: our modules built from its state dicts.

Each function takes tensors named without the module's own prefix and gives a module, in their dtype
and in evaluation mode, that takes its inputs as the release's does and holds ours. ``*_table`` gives
the names, for both directions.
"""

from mmi_megatron.convert.released_language import language_layers, language_layers_table
from mmi_megatron.convert.released_mmfs import ReleasedMMFS, intervals, mmfs, mmfs_table
from mmi_megatron.convert.released_tokenizer import (
    clip_table,
    perceiver,
    perceiver_table,
    resampler_config,
    tokenizer_names,
    tokenizer_table,
    visual_tokenizer,
)
from mmi_megatron.convert.released_unet import unet_mmfs, unet_mmfs_table

__all__ = [
    "ReleasedMMFS",
    "clip_table",
    "intervals",
    "language_layers",
    "language_layers_table",
    "mmfs",
    "mmfs_table",
    "perceiver",
    "perceiver_table",
    "resampler_config",
    "tokenizer_names",
    "tokenizer_table",
    "unet_mmfs",
    "unet_mmfs_table",
    "visual_tokenizer",
]
