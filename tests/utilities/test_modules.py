"""Modes of modules are restored, one by one."""

from __future__ import annotations

import contextlib

from torch import nn

from lightning_quant.utilities.modules import preserve_modes


def test_each_part_gets_its_own_mode_back() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.ReLU()))
    module[1].eval()
    module[1][1].train()
    before = [part.training for part in module.modules()]
    with contextlib.suppress(KeyError), preserve_modes(module):
        module.eval()
        raise KeyError
    assert [part.training for part in module.modules()] == before


def test_parts_that_are_replaced_keep_their_mode() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    with preserve_modes(module):
        module[0] = nn.Dropout().eval()
    assert module.training
    assert not module[0].training
