"""Which chip is in which phone, and what is known of it without asking anybody."""

from __future__ import annotations

import pytest

from lightning_quant.deploy.socs import HEXAGON, QNN_SOC_IDS, check_activations, soc_of
from lightning_quant.errors import ConfigurationError, UnknownDeviceError


def test_every_device_has_a_chip_that_the_compiler_knows() -> None:
    assert HEXAGON.keys() == QNN_SOC_IDS.keys()
    assert soc_of("samsung galaxy s24 ") == soc_of("sm8650") == "SM8650"
    with pytest.raises(UnknownDeviceError, match=r"expected one of Samsung Galaxy S2.*or the name of a chip"):
        soc_of("Samsung Galaxy S2")


@pytest.mark.parametrize("device", ["Samsung Galaxy S21", "sm8350"])
def test_activations_that_a_chip_lacks(device: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"w8a16 on {device}: expected a chip.*Hexagon v68 of SM8350"):
        check_activations(device, "w8a16")
    check_activations(device, None)


@pytest.mark.parametrize("device", ["Samsung Galaxy S22 5G", "Samsung Galaxy S24", "a phone that only AI Hub knows"])
def test_activations_that_it_has_or_may_have(device: str) -> None:
    check_activations(device, "w8a16")
