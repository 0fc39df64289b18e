"""One calibration pass for several precisions, kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.calibration_cache import StatisticsCache
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork
from tests.helpers.networks import Body, call, images, quantized
from tests.helpers.small import encodings


class Samples:
    """Calls of a network, and how often the network was run with them."""

    def __init__(self, factor: float = 1) -> None:
        self.factor = factor

    def __iter__(self) -> Iterator[NetworkInputs]:
        return iter([call(self.factor * images(4, seed)) for seed in (3, 4)])


def run(precision: str, cache: Path | None, samples: Any = None, **recipe: Any) -> tuple[dict[str, Tensor], int]:
    """Ranges, and how many samples went through the network to find them."""
    network: QuantizedNetwork = quantized(Body(), precision=precision, **recipe)
    passed = 0

    def count(module: Any, args: Any) -> None:
        nonlocal passed
        passed += len(args[0])

    network.network.register_forward_pre_hook(count)
    assert calibrate(network, samples or Samples(), cache=StatisticsCache(cache) if cache else None) == 8
    return encodings(network), passed


def same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    assert mine.keys() == theirs.keys()
    return all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("estimator", ["min_max", "tf_enhanced", "percentile"])
def test_one_pass_for_each_width_of_weights(tmp_path: Path, estimator: str) -> None:
    passes = []
    for precision in ("w8a8", "w8a16", "w4a16", "w4a8"):
        alone, _ = run(precision, None, range_estimator=estimator)
        shared, passed = run(precision, tmp_path, range_estimator=estimator)
        assert same(shared, alone)
        passes.append(passed)
    # one sample runs for AIMET's protection against overflow
    assert passes == [8, 1, 8, 1]
    assert len(list(tmp_path.glob("*.npz"))) == 2


def test_other_data_other_weights_and_other_estimators_are_other_passes(tmp_path: Path) -> None:
    run("w8a8", tmp_path)
    assert run("w8a8", tmp_path)[1] == 1
    alone, _ = run("w8a8", None, Samples(2))
    other, passed = run("w8a8", tmp_path, Samples(2))
    assert passed == 8
    assert same(other, alone)
    assert run("w8a8", tmp_path, range_estimator="percentile")[1] == 8

    network = quantized(Body())
    with torch.no_grad():
        network.network.get_parameter("conv.weight")[0, 0, 0, 0] += 1
    before = set(tmp_path.iterdir())
    calibrate(network, Samples(), cache=StatisticsCache(tmp_path))
    assert len(set(tmp_path.iterdir()) - before) == 2  # its statistics and their lock


@pytest.mark.parametrize("damage", [lambda b: b[:-40], lambda b: b"", lambda b: b[:100] + b"\xff" + b[101:]])
def test_a_damaged_file_is_written_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    expected, _ = run("w8a8", tmp_path)
    (file,) = tmp_path.glob("*.npz")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    again, passed = run("w8a8", tmp_path)
    assert same(again, expected)
    assert passed == 8
    assert run("w8a8", tmp_path)[1] == 1


def test_a_kill_leaves_nothing_locked(tmp_path: Path) -> None:
    class Killed(Samples):
        def __iter__(self) -> Iterator[NetworkInputs]:
            yield next(super().__iter__())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("w8a8", tmp_path, Killed())
    assert not list(tmp_path.glob("*.npz"))
    (lock,) = tmp_path.glob("*.lock")
    FileLock(lock).acquire(timeout=0)
    expected, _ = run("w8a8", None)
    other = tmp_path / "other"
    assert same(run("w8a8", other)[0], expected)


def test_another_process_waits_for_the_first(tmp_path: Path) -> None:
    class Watching(Samples):
        locked = 0

        def __iter__(self) -> Iterator[NetworkInputs]:
            (lock,) = tmp_path.glob("*.lock")
            with pytest.raises(Timeout):
                FileLock(lock, is_singleton=False).acquire(timeout=0)
            Watching.locked += 1
            return super().__iter__()

    run("w8a8", tmp_path, Watching())
    assert Watching.locked == 1
