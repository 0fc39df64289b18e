"""One network of the zoo: where it comes from, how it is made, and what it is called with."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Entry:
    """A network that nobody here wrote.

    Args:
        name: ``source/network``, unique; globs of ``--only`` match it.
        make: makes it with random weights, without a download.
        inputs: what it is called with, for a number of samples and a generator; samples along axis 0.
        note: what was left out of it, if anything.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], Inputs]
    note: str = ""

    def build(self) -> nn.Module:
        """The network in eval mode: the same weights every time, batch norm statistics set from random samples."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.name.encode()))
            network = self.make()
            fill_zeros(network)
            settle(network, self.batch(16, seed=1000))
        return network

    def batch(self, count: int, seed: int = 0) -> Inputs:
        """Random samples, the same for the same seed."""
        return self.inputs(count, torch.Generator().manual_seed(seed))


def fill_zeros(network: nn.Module) -> None:
    """Random values for weights that start at zero, such as heads of MLPs: a trained network has no such weights."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and not module.weight.any():
            nn.init.trunc_normal_(module.weight, std=0.02)


def settle(network: nn.Module, batch: Inputs) -> None:
    """Set the statistics of batch norms to those of a batch, as training would have; ends in eval mode.

    One batch, not the average over several: in a deep network whose statistics come from small batches the signal
    grows from norm to norm.
    """
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if norms:
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        network.train()
        with torch.no_grad():
            network(*copy.deepcopy(batch))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    network.eval()


def images(size: int | tuple[int, int] = 64, channels: int = 3) -> Callable[[int, torch.Generator], Inputs]:
    """Images (N, channels, height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    return noise(channels, height, width)


def noise(*shape: int) -> Callable[[int, torch.Generator], Inputs]:
    """Gaussian noise (N, *shape)."""

    def make(count: int, generator: torch.Generator) -> Inputs:
        return (torch.randn(count, *shape, generator=generator),)

    return make


def tokens(length: int, vocabulary: int) -> Callable[[int, torch.Generator], Inputs]:
    """Token ids (N, length), from 3 on: the first ones have meanings of their own."""

    def make(count: int, generator: torch.Generator) -> Inputs:
        return (torch.randint(3, vocabulary, (count, length), generator=generator),)

    return make
