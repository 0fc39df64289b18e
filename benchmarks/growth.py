"""How the cost of training grows with the size of the images and the batch: the ratio to float should stay flat."""

from __future__ import annotations

import argparse

import torch

from benchmarks.measure import photographs, publish, table
from benchmarks.qat_step import measure

# batch, height, width; the last one is one step at the full size of Cityscapes
SHAPES = ((1, 192, 256), (4, 192, 256), (16, 192, 256), (4, 128, 256), (2, 256, 512), (1, 512, 1024), (1, 1024, 2048))


def main() -> None:
    """Measure FFNet-nano at every shape, learned ranges at W8A8."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--camvid", default="../shared/data/camvid", help="photographs in the layout of Cityscapes")
    parser.add_argument("--network", default="ffnet_nano")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results, rows = [], []
    for batch, height, width in SHAPES:
        images = photographs(arguments.camvid, batch, (height, width))
        one = measure(arguments.network, "w8a8", True, images, rounds=3 if height > 512 else 5)
        results.append(one)
        rows.append([f"{batch}×{height}×{width}"])
        for what in ("train_s", "eval_s", "saved_bytes"):
            rows[-1] += [f"{one[what][who] / one[what]['float']:.2f}" for who in ("stock", "ours")]
        rows[-1] += [f"{one['peak_bytes'][who] / 2**20:.0f}" for who in ("float", "stock", "ours")]
    heads = ["images", "step: stock", "**ours**", "validation: stock", "**ours**", "saved: stock", "**ours**"]
    publish("growth", table([*heads, "peak MiB float", "stock", "ours"], rows), results)


if __name__ == "__main__":
    main()
