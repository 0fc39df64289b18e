"""Which chip is in which phone, for targets that compile for a chip without having the phone."""

from __future__ import annotations

import difflib

from lightning_quant.errors import ConfigurationError, UnknownDeviceError

# From this version of the Hexagon NPU on activations may have 16 bits.
HEXAGON_WITH_INT16 = 69

# Chips that the NPU's compiler knows (QAIRT 2.51), with the version of their Hexagon NPU.
# Names and chips of phones: Qualcomm AI Hub's list of devices (attributes chipset:… and hexagon:…).
HEXAGON = {
    "SM8350": 68,
    "SM8450": 69,
    "SM8475": 69,
    "SM8550": 73,
    "SM8635": 73,
    "SM8650": 75,
    "SM8750": 79,
    "SM8850": 81,
    "SC8380XP": 73,
    "SC8480XP": 81,
}

# QNN's number of each chip, which the compiled model's metadata states.
QNN_SOC_IDS = {
    "SM8350": 30,
    "SM8450": 36,
    "SM8475": 42,
    "SM8550": 43,
    "SM8635": 68,
    "SM8650": 57,
    "SM8750": 69,
    "SM8850": 87,
    "SC8380XP": 60,
    "SC8480XP": 88,
}

_DEVICES = {
    "Samsung Galaxy S21": "SM8350",
    "Samsung Galaxy S21 Ultra": "SM8350",
    "Samsung Galaxy S21+": "SM8350",
    "Samsung Galaxy S22 (Family)": "SM8450",
    "Samsung Galaxy S22 5G": "SM8450",
    "Samsung Galaxy S22 Ultra 5G": "SM8450",
    "Samsung Galaxy S22+ 5G": "SM8450",
    "Samsung Galaxy Tab S8": "SM8450",
    "Xiaomi 12": "SM8450",
    "Xiaomi 12 Pro": "SM8450",
    "Samsung Galaxy S23": "SM8550",
    "Samsung Galaxy S23 (Family)": "SM8550",
    "Samsung Galaxy S23 Ultra": "SM8550",
    "Samsung Galaxy S23+": "SM8550",
    "Samsung Galaxy S24": "SM8650",
    "Samsung Galaxy S24 (Family)": "SM8650",
    "Samsung Galaxy S24 Ultra": "SM8650",
    "Samsung Galaxy S24+": "SM8650",
    "Samsung Galaxy S25": "SM8750",
    "Samsung Galaxy S25 (Family)": "SM8750",
    "Samsung Galaxy S25 Ultra": "SM8750",
    "Samsung Galaxy S25+": "SM8750",
    "Snapdragon 8 Elite QRD": "SM8750",
    "Snapdragon 8 Elite Gen 5 QRD": "SM8850",
    "Snapdragon X Elite CRD": "SC8380XP",
    "Snapdragon X2 Elite CRD": "SC8480XP",
}

_SOCS = {name.lower(): soc for name, soc in _DEVICES.items()} | {soc.lower(): soc for soc in HEXAGON}


def soc_of(device: str) -> str:
    """Return the chip of a device, e.g. ``"SM8650"`` for ``"Samsung Galaxy S24"``; the name of a chip as it is.

    Raises:
        UnknownDeviceError: if it is not known, with near names.
    """
    soc = _SOCS.get(device.strip().lower())
    if soc is None:
        near = difflib.get_close_matches(device, [*_DEVICES, *HEXAGON], n=3, cutoff=0.4)
        raise UnknownDeviceError(
            f"No chip known for device {device!r}: expected one of {', '.join(near or _DEVICES)}, or the name of a "
            f"chip ({', '.join(HEXAGON)})."
        )
    return soc


def hexagon_of(device: str) -> int | None:
    """Return the version of a device's Hexagon NPU, e.g. 75 for ``"Samsung Galaxy S24"``; ``None`` if not known."""
    soc = _SOCS.get(device.strip().lower())
    return None if soc is None else HEXAGON[soc]


def check_activations(device: str, int16_activations: str | None) -> None:
    """Refuse 16-bit activations on a device whose chip is known not to have them.

    Args:
        device: its name, or that of a chip; one that is not in the table passes.
        int16_activations: the part of the network that has them, if any.

    Raises:
        ConfigurationError: naming that part and the chip.
    """
    hexagon = hexagon_of(device)
    if int16_activations and hexagon is not None and hexagon < HEXAGON_WITH_INT16:
        raise ConfigurationError(
            f"{int16_activations} on {device}: expected a chip with 16-bit activations, but the Hexagon "
            f"v{hexagon} of {soc_of(device)} has 8-bit ones only. Use w8a8 or w4a8, or a newer device."
        )
