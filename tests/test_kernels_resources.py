"""What ptxas says of the CUDA kernels, and that those that run in every step keep to their registers."""

from __future__ import annotations

import pytest

from mmi_kernels import build, resources

MATRIX = "_ZN3mmi14matrix_forwardINS_8BFloat16ELb1EEEvNS_9ArgumentsIT_fEE"
GATHER = "_ZN3mmi14gather_forwardIffLi4ELi3ELb0EEEvNS_9ArgumentsIT_T0_EE"
PTXAS = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{MATRIX}' for 'sm_90'
ptxas info    : Function properties for {MATRIX}
    24 bytes stack frame, 52 bytes spill stores, 48 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 24 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compiling entry function '{GATHER}' for 'sm_90'
ptxas info    : Function properties for {GATHER}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 70 registers, used 1 barriers
"""


def test_what_ptxas_prints_is_read():
    gather, matrix = resources.parse(PTXAS, "sm_90")
    assert gather == resources.Usage("gather_forward<f32, 4, 3, general>", "sm_90", 70, 0, 0, 0, 0)
    assert matrix == resources.Usage("matrix_forward<bf16, fused>", "sm_90", 96, 52, 48, 24, 1024)


def test_words_of_ptxas_that_are_not_understood_are_an_error():
    with pytest.raises(build.BuildError, match=f"ptxas says nothing of {MATRIX}"):
        resources.parse(PTXAS.replace("spill stores", "moved"), "sm_90")


@pytest.mark.soak
@pytest.mark.parametrize("value_type", ["f32", "bf16", "f16"])
def test_no_forward_kernel_spills_on_sm_90(value_type):
    """Takes nvcc and a minute or two."""
    forward = [
        u for u in resources.usages("sm_90", value_type) if "forward" in u.kernel or "softmax" in u.kernel
    ]
    assert len(forward) >= 6
    assert [u for u in forward if u.spill_stores or u.spill_loads] == []
