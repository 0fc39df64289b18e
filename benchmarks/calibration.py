"""The cost of calibration: compared with AIMET's classes, in float passes, and for a sweep of three precisions."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.measure import float_and_simulated, photographs, publish, table
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.calibration_cache import StatisticsCache
from lightning_quant.simulation.fast.short_path import slow_down
from lightning_quant.simulation.inputs import NetworkInputs, Passes

BATCH = 8


def seconds_of(
    name: str, precision: str, images: torch.Tensor, estimator: str, *, stock: bool = False, cache: str | None = None
) -> float:
    """Calibrate a fresh simulation."""
    _, network = float_and_simulated(name, precision, images, range_estimator=estimator)
    if stock:
        slow_down(network.network)

    def batches() -> Iterator[NetworkInputs]:
        return (NetworkInputs((batch,)) for batch in images.split(BATCH))

    started = time.perf_counter()
    calibrate(network, Passes(batches), cache=StatisticsCache(cache) if cache else None)
    return time.perf_counter() - started


def float_seconds(name: str, images: torch.Tensor) -> float:
    """The float network's forward passes over the same images, batch norms folded."""
    network, _ = float_and_simulated(name, "w8a8", images)
    with torch.no_grad():
        network(images[:BATCH])
        started = time.perf_counter()
        for batch in images.split(BATCH):
            network(batch)
        return time.perf_counter() - started


def main() -> None:
    """Measure all three questions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--camvid", default="../shared/data/camvid", help="photographs in the layout of Cityscapes")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--networks", nargs="+", default=["lraspp", "ffnet_nano"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    count = arguments.images
    images = photographs(arguments.camvid, count)
    results: list[dict[str, Any]] = []
    rows = []
    for name in arguments.networks:
        for estimator in ("min_max", "tf_enhanced", "percentile"):
            in_float = float_seconds(name, images)
            stock = seconds_of(name, "w8a8", images, estimator, stock=True)
            ours = [seconds_of(name, "w8a8", images[:n], estimator) for n in (count // 4, count // 2, count)]
            results.append({
                "network": name, "estimator": estimator, "images": count, "float_s": in_float, "stock_s": stock,
                "ours_s": {str(n): s for n, s in zip((count // 4, count // 2, count), ours, strict=True)},
            })  # fmt: skip
            rows.append([
                name, estimator, f"{stock:.1f}", *(f"{s:.1f}" for s in ours), f"{ours[-1] / stock:.3f}",
                f"{ours[-1] / in_float:.2f}",
            ])  # fmt: skip
    heads = [
        "network", "ranges", f"stock s, {count} images", *(f"ours s, {n}" for n in (count // 4, count // 2, count)),
        "**ours / stock**", "**in float forward passes**",
    ]  # fmt: skip
    publish("calibration", table(heads, rows), results)

    sweeps, rows = [], []
    for name in arguments.networks:
        few_images = images[: count // 4]
        for estimator in ("min_max", "tf_enhanced"):
            with tempfile.TemporaryDirectory() as folder:
                shared = [seconds_of(name, p, few_images, estimator, cache=folder) for p in ("w8a8", "w8a16", "w4a16")]
            single = seconds_of(name, "w8a8", few_images, estimator)
            stock = seconds_of(name, "w8a8", few_images, estimator, stock=True)
            values = {"single_s": single, "stock_single_s": stock, "sweep_s": shared}
            sweeps.append({"network": name, "estimator": estimator, "images": len(few_images), **values})
            rows.append([
                name, estimator, *(f"{s:.1f}" for s in shared), f"{sum(shared) / single:.2f}",
                f"{sum(shared) / stock:.2f}",
            ])  # fmt: skip
    heads = ["network", "ranges", "s W8A8", "W8A16", "W4A16", "**all / one of ours**", "**all / one of stock**"]
    publish("calibration_sweep", table(heads, rows), sweeps)


if __name__ == "__main__":
    main()
