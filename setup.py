"""Packages and where they lie; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["mmi_megatron", "mmi_megatron.*", "data_pipeline", "data_pipeline.*"]),
        "mmi_kernels",
        "mmi_kernels.csrc",
    ],
    package_dir={"mmi_kernels": "kernels/mmi_kernels", "mmi_kernels.csrc": "kernels/csrc"},
    package_data={
        "mmi_megatron": ["presets/*.yaml", "presets/fragments/*/*.yaml"],
        "mmi_kernels.csrc": ["*/*.h", "*/*.cpp", "*/*.cu", "*/*.cuh"],
    },
)
