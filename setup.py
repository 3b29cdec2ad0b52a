"""Packages and where they lie; everything else is in pyproject.toml."""

from setuptools import Extension, find_packages, setup

# The decoder of JPEGs, where a compiler and the headers of libjpeg-turbo are (Debian: libjpeg-dev): where it
# cannot be built, installation goes on without it, `mmi doctor` says so, and data.decoder has others.
jpeg = Extension(
    "data_pipeline._jpeg",
    sources=["data_pipeline/csrc/jpeg.cpp"],
    depends=["data_pipeline/csrc/resample.h"],
    libraries=["jpeg"],
    define_macros=[("Py_LIMITED_API", "0x030b0000")],
    py_limited_api=True,
    # No fused multiply-add: weights are worked out alike on every processor.
    extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden"],
    optional=True,
)

setup(
    ext_modules=[jpeg],
    packages=[
        *find_packages(include=["mmi_megatron", "mmi_megatron.*", "data_pipeline", "data_pipeline.*"]),
        "mmi_kernels",
        "mmi_kernels.csrc",
    ],
    package_dir={"mmi_kernels": "kernels/mmi_kernels", "mmi_kernels.csrc": "kernels/csrc"},
    package_data={
        "mmi_megatron": ["presets/*.yaml", "presets/fragments/*/*.yaml"],
        "data_pipeline": ["csrc/*"],
        "mmi_kernels.csrc": ["*/*.h", "*/*.cpp", "*/*.cu", "*/*.cuh"],
    },
)
