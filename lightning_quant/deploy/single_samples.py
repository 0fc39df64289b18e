"""Calls of a network cut into single samples: a file has fixed shapes, and a device takes one sample at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lightning_quant.errors import CalibrationError, ConfigurationError
from lightning_quant.simulation.inputs import NetworkInputs


def single_samples(call: NetworkInputs) -> Iterator[NetworkInputs]:
    """Return the samples of a call, one call each."""
    return (call.samples(index, index + 1) for index in range(call.batch_size))


def calls_given(
    samples: Tensor | NetworkInputs | Iterable[Tensor | NetworkInputs], like: NetworkInputs
) -> list[NetworkInputs]:
    """Return the calls that a user gave, on the CPU; a tensor is the only argument of one.

    Args:
        samples: a batch, a call, or several.
        like: a call of the network, which knows where the samples of a batch lie.

    Raises:
        ConfigurationError: for something else.
    """
    several = [samples] if isinstance(samples, (Tensor, NetworkInputs)) else list(samples)
    calls = []
    for one in several:
        call = NetworkInputs((one,)) if isinstance(one, Tensor) else one
        if not isinstance(call, NetworkInputs):
            raise ConfigurationError(
                f"samples holds a {type(one).__name__}: expected tensors, or NetworkInputs(args, kwargs) for a network "
                "that takes more than one."
            )
        calls.append(call.to(torch.device("cpu")).batched_like(like))
    return calls


def first_samples(
    calls: Iterable[NetworkInputs], count: int, like: NetworkInputs | None = None, among: int | None = None
) -> list[NetworkInputs]:
    """Return the first ``count`` samples of a stream of calls, one call each, all of one size: a file has fixed shapes.

    Of a step that calls the network several times they are dealt out over its calls, so that states that begin at
    zero are not zero in all of them.

    Args:
        calls: of the network, of any size.
        count: how many samples are wanted.
        like: a call of the size that is wanted. If no sample has it, that of the first one is taken.
        among: look no further than this number of samples. Default: to the end.

    Raises:
        CalibrationError: if there is none.
    """
    like = None if like is None else like.first(1)
    wanted: list[NetworkInputs] = []
    others: list[NetworkInputs] = []
    for index, samples in enumerate(_by_sample(calls)):
        for size, found in ((like, wanted), (others[0] if others else None, others)):
            fitting = [one for one in samples if size is not None and one.has_sizes_of(size)]
            if fitting:
                found.append(fitting[index % len(fitting)])
                break
        else:
            if not others:
                same_structure = (one for one in samples if like is not None and one.ranks == like.ranks)
                others.append(next(same_structure, samples[0]))
        if len(others if like is None else wanted) >= count or index + 1 == among:
            break
    if not wanted and not others:
        raise CalibrationError("The data loader gave no batch: expected at least one sample.")
    return (wanted or others)[:count]


def _by_sample(calls: Iterable[NetworkInputs]) -> Iterator[list[NetworkInputs]]:
    """Yield for each sample what each call of its step was given of it."""
    step: list[NetworkInputs] = []
    for call in calls:
        step.append(call)
        if call.last:
            for index in range(max(one.batch_size for one in step)):
                yield [one.samples(index, index + 1) for one in step if index < one.batch_size]
            step = []
