"""MM-Interleaved on Megatron-Core: the model, its training and its use.

Importing the package is quick and needs neither torch nor Megatron.
"""

from mmi_megatron import platform

platform.prepare()
