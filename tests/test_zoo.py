"""The short zoo: networks of other packages, from calibration to the emulated NPU (all of them: `make zoo`)."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.zoo import emulator, ours
from benchmarks.zoo.catalogue import catalogue
from benchmarks.zoo.limits import measured
from benchmarks.zoo.record import OURS, all_the_way, garbage, reached

pytestmark = pytest.mark.slow

PRECISION = "w8a8"
# Three times what the slowest takes; the NPU's compiler needs minutes for some networks that are left in float.
LIMIT_S = 120
# Every stage, with no layer of the NPU in float, none on the CPU and an output that resembles the simulation's.
NETWORKS = (
    "torchvision/ssdlite320_mobilenet_v3_large",
    "timm/swin_tiny_patch4_window7_224",
    "smp/Segformer-mit_b0",
    "torch/gru",
)
# Made of parts that the others have too.
ALIKE = (
    "timm/convnext_atto",
    "smp/Unet-groupnorm",
    "torchvision/resnet18",
    "timm/mobilenetv4_conv_small",
    "timm/vit_tiny_patch16_224",
    "timm/mobilevit_xxs",
    "timm/cs3darknet_s",
    "torch/transformer_encoder",
)


@pytest.fixture(scope="module", autouse=True)
def kernels_are_built() -> None:
    """They are on first use, which takes longer than a network may."""
    measured(ours.warm_up, {"network": "", "by": OURS, "precision": ""}, limit_s=600, limit_gb=8)


@pytest.mark.parametrize("name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.torture) for name in ALIKE)])
def test_a_network_nobody_here_wrote_goes_all_the_way(name: str) -> None:
    line = measured(ours.measure, {"network": name, "by": OURS, "precision": PRECISION}, limit_s=LIMIT_S, limit_gb=8)
    shown = _shown(line)
    if emulator.available():
        assert all_the_way(line), shown
        assert not garbage(line), shown
    else:
        assert reached(line) == "export", shown


def test_the_catalogue_holds_what_the_zoo_promises() -> None:
    networks = catalogue()
    assert len(networks) >= 110
    sources = [name.partition("/")[0] for name in networks]
    assert sources.count("timm") >= 50
    decoders = {name.partition("/")[2].partition("-")[0] for name in networks if name.startswith("smp/")}
    assert all(sum(name.startswith(f"smp/{decoder}-") for name in networks) >= 3 for decoder in decoders - {"Unet"})
    assert len(decoders) == 12


def _shown(line: dict[str, Any]) -> dict[str, Any]:
    """What a failure shows of a network."""
    wanted = (
        "passed",
        "errors",
        "npu",
        "emulated",
        "cpu_names",
        "island_names",
        "left_in_float_names",
        "finding_texts",
        "seconds",
    )
    return {key: line[key] for key in wanted if key in line}
