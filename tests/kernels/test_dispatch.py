"""The host's arithmetic agrees with Triton's, which kernels use."""

import triton

from llava15_kernels._dispatch import cdiv, next_power_of_2


def test_rounding():
    assert all(next_power_of_2(n) == triton.next_power_of_2(n) for n in range(1, 300)) and next_power_of_2(0) == 1
    assert all(cdiv(a, b) == triton.cdiv(a, b) for a in range(40) for b in range(1, 9))
