"""The short zoo: twelve networks of other packages, from calibration to the emulated NPU (all of them: `make zoo`)."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.zoo import emulator, ours
from benchmarks.zoo.catalogue import catalogue
from benchmarks.zoo.limits import measured
from benchmarks.zoo.record import OURS, STAGES, all_the_way, garbage, reached

PRECISION = "w8a8"
# Three times what the slowest takes; the NPU's compiler needs minutes for some networks that are left in float.
LIMIT_S = 60
ALL_THE_WAY = "all the way"
# How far each has to go: "all the way" is every stage, with no layer of the NPU in float, none on the CPU and an output
# that resembles the simulation's; else the last stage before the first that fails. Raise it when one goes further.
EXPECTED_STAGE = {
    "torchvision/resnet18": ALL_THE_WAY,
    "torchvision/ssdlite320_mobilenet_v3_large": ALL_THE_WAY,
    "timm/mobilenetv4_conv_small": ALL_THE_WAY,
    "timm/convnext_atto": "export",
    "timm/vit_tiny_patch16_224": "emulator",
    "timm/swin_tiny_patch4_window7_224": "emulator",
    "timm/mobilevit_xxs": "emulator",
    "timm/cs3darknet_s": ALL_THE_WAY,
    "smp/Segformer-mit_b0": "emulator",
    "smp/Unet-groupnorm": "emulator",
    "torch/gru": "emulator",
    "torch/transformer_encoder": "load",
}


@pytest.fixture(scope="module", autouse=True)
def kernels_are_built() -> None:
    """They are on first use, which takes longer than a network may."""
    measured(ours.warm_up, {"network": "", "by": OURS, "precision": ""}, limit_s=600, limit_gb=8)


@pytest.mark.parametrize("name", EXPECTED_STAGE)
def test_a_network_nobody_here_wrote_goes_as_far_as_it_shall(name: str) -> None:
    line = measured(ours.measure, {"network": name, "by": OURS, "precision": PRECISION}, limit_s=LIMIT_S, limit_gb=8)
    told = _told(line)
    if EXPECTED_STAGE[name] != ALL_THE_WAY:
        stages = STAGES[OURS]
        assert stages.index(reached(line)) >= stages.index(EXPECTED_STAGE[name]), told
    elif emulator.available():
        assert all_the_way(line), told
        assert not garbage(line), told
    else:
        assert reached(line) == "export", told


def test_the_catalogue_holds_what_the_zoo_promises() -> None:
    networks = catalogue()
    assert len(networks) >= 110
    sources = [name.partition("/")[0] for name in networks]
    assert sources.count("timm") >= 50
    decoders = {name.partition("/")[2].partition("-")[0] for name in networks if name.startswith("smp/")}
    assert all(sum(name.startswith(f"smp/{decoder}-") for name in networks) >= 3 for decoder in decoders - {"Unet"})
    assert len(decoders) == 12


def _told(line: dict[str, Any]) -> dict[str, Any]:
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
