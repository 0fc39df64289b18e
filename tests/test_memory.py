"""The peak of memory over a block."""

from __future__ import annotations

import pytest
import torch

from lightning_quant.memory import PeakMemory


def test_the_peak_is_that_of_the_block() -> None:
    with PeakMemory() as small:
        pass
    with PeakMemory() as large:
        block = torch.ones(50_000_000)  # 200 MB
        del block
    with PeakMemory() as after:
        pass
    if large.peak_bytes is None or small.peak_bytes is None or after.peak_bytes is None:
        pytest.skip("this system does not tell the peak of a process")
    assert large.peak_bytes - small.peak_bytes > 150e6
    assert large.peak_bytes - after.peak_bytes > 150e6
