"""Common to all tests: one thread a process, for tests run beside each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import mmi_megatron  # noqa: F401  (torchvision can be imported from here on)
