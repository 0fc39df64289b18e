"""Two input sizes of one network, compiled for the NPU: a binary each, and one binary that holds the weights once.

``python -m benchmarks.sizes`` writes ``benchmarks/results/devices/sizes.md``. Weights are random: only bytes count.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.push import Push
from lightning_quant.deploy.samples import Samples
from lightning_quant.deploy.sizes import InputSize, sized_calls
from lightning_quant.domains.segmentation.ffnet import ffnet_40s, ffnet_nano
from lightning_quant.precision import Precision
from lightning_quant.recipe import QuantRecipe
from lightning_quant.simulation.build import quantize
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.inputs import NetworkInputs

NETWORKS = {"FFNet-nano": ffnet_nano, "FFNet-40S": ffnet_40s}
OWN, FURTHER = [256, 512], [128, 256]
RESULTS = Path(__file__).parent / "results" / "devices" / "sizes.md"
HEADER = ["network", "precision", "256×512", "128×256", "apart", "shared", "times the larger one"]


def measure(network: str, precision: str) -> list[DeviceReport]:
    """Export a network at both sizes, compile it, and return the report of each size."""
    torch.manual_seed(0)
    inputs = NetworkInputs((torch.rand(1, 3, *OWN),))
    quantized = quantize(NETWORKS[network](), inputs, QuantRecipe(precision=Precision.parse(precision)))
    calibrate(quantized.eval(), [inputs])
    with tempfile.TemporaryDirectory() as scratch:
        bundle = export_bundle(quantized, Path(scratch) / "net", [inputs], "warn", sizes=[FURTHER])
        sized = sized_calls(quantized, InputSize.parse([FURTHER]), [inputs])
        further = {size: Samples.of(quantized, bundle.manifest, one.calls) for size, one in sized.items()}
        samples = Samples.of(quantized, bundle.manifest, [inputs])
        measured = Push("htp_emulator", ["Samsung Galaxy S24"], 1800, {}).run(bundle, samples, further)
    return [one.report for one in measured]


def main() -> None:
    """Measure what the command line names and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--precisions", nargs="+", default=["w8a8", "w8a16", "w4a16"])
    arguments = parser.parse_args()
    lines = [HEADER, ["---"] * len(HEADER)]
    for network in arguments.networks:
        for precision in arguments.precisions:
            reports = measure(network, precision)
            alone = [report.bytes["compiled_alone"] for report in reports]
            apart, shared = reports[0].bytes["compiled_apart"], reports[0].bytes["compiled"]
            sizes = [f"{size / 1e6:.2f}" for size in (*alone, apart, shared)]
            lines.append([network, precision.upper(), *sizes, f"{shared / max(alone):.2f}"])
            print(*lines[-1], flush=True)
    RESULTS.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


if __name__ == "__main__":
    main()
