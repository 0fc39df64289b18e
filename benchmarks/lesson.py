"""The lesson's own case: FFNet-40S calibrated with images of 1024×2048. Seconds and peak memory, ours and stock.

Each runs in a process of its own, so that the peak is its own. The time is linear in the images (see `calibration`);
`--images 100`, the default, is the lesson's number.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.measure import float_and_simulated, photographs, publish, table
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.utilities.memory import PeakMemory

SIZE = (1024, 2048)


def alone(who: str, estimator: str, images: int, camvid: str) -> dict[str, Any]:
    """Calibrate in this process."""
    few = photographs(camvid, 8, SIZE)
    batches = (NetworkInputs((few[index % 8 :][:1],)) for index in range(images))
    network, simulated = float_and_simulated("ffnet_40s", "w8a8", few[:1], range_estimator=estimator)
    simulated.recipe = simulated.recipe.__class__(**{**vars(simulated.recipe), "calibration_samples": images})
    if who == "stock":
        from lightning_quant.simulation.fast.short_path import slow_down

        slow_down(simulated.network)
    with PeakMemory() as memory:
        started = time.perf_counter()
        if who == "float":
            with torch.no_grad():
                for batch in batches:
                    network(*batch.args)
        else:
            calibrate(simulated, batches)
        seconds = time.perf_counter() - started
    return {"who": who, "estimator": estimator, "images": images, "seconds": seconds, "peak": memory.peak_bytes}


def main() -> None:
    """Measure float, stock and ours one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--camvid", default="../shared/data/camvid", help="photographs in the layout of Cityscapes")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--alone", nargs=2, metavar=("WHO", "ESTIMATOR"), help="measure one in this process")
    arguments = parser.parse_args()
    if arguments.alone:
        who, estimator = arguments.alone
        print(json.dumps(alone(who, estimator, arguments.images, arguments.camvid)))
        return
    cases = [("float", "min_max"), ("ours", "min_max"), ("stock", "min_max"), ("ours", "tf_enhanced")]
    results = []
    for case in [*cases, ("stock", "tf_enhanced")]:
        argv = [sys.executable, "-m", "benchmarks.lesson", "--alone", *case, "--images", str(arguments.images)]
        done = subprocess.run([*argv, "--camvid", arguments.camvid], check=True, capture_output=True, text=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    rows = [[one["who"], one["estimator"], f"{one['seconds']:.0f}", f"{one['peak'] / 2**30:.1f}"] for one in results]
    publish("lesson", table([f"FFNet-40S, {arguments.images} images", "ranges", "s", "peak GiB"], rows), results)


if __name__ == "__main__":
    main()
