"""The manifest: the same values on both ways, and states that cannot be trusted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lightning_quant.errors import CheckpointError
from lightning_quant.precision import Precision
from lightning_quant.simulation.manifest import FORMAT_VERSION, Manifest
from tests.helpers.networks import Body, calibrated, quantized


def test_precisions_are_precisions_and_the_stored_values_plain() -> None:
    manifest = calibrated(Body(), precision="w4a8", overrides={"head": "w8a16"}).manifest()
    assert manifest.precision == Precision(4, 8)
    assert manifest.overrides == {"head": Precision(8, 16)}
    stored = manifest.to_dict()
    assert json.loads(json.dumps(stored)) == stored
    assert list(stored) == [
        "lightning_quant",
        "format_version",
        "aimet_torch",
        "torch",
        "precision",
        "hardware",
        "overrides",
        "range_estimator",
        "calibrated",
        "float_sha256",
        "equalized",
        "raised",
        "inputs",
        "other_inputs",
    ]
    assert Manifest.from_dict({**stored, "parity": {}, "name": "net"}) == manifest  # as in a bundle


def test_the_options_of_the_range_estimator_are_stored() -> None:
    chosen = {"percentile": {"percentile": 99.9}}
    network = quantized(Body(), range_estimator=chosen)
    assert network.manifest().range_estimator == chosen
    other = quantized(Body(), range_estimator="tf_enhanced")
    other.load_state_dict(network.state_dict())
    assert other.range_estimator.spec == chosen
    assert {type(one.encoding_analyzer).__name__ for one in other.quantizers()} == {"PercentileEncodingAnalyzer"}
    assert {one.encoding_analyzer.percentile for one in other.quantizers()} == {99.9}


@pytest.mark.parametrize("state", [None, 3, {}, {"precision": "w8a8"}, ["lightning_quant"]])
def test_what_is_not_a_manifest(state: Any) -> None:
    with pytest.raises(CheckpointError, match="was not written by lightning_quant"):
        Manifest.of_checkpoint(state)


def test_manifest_of_a_later_format() -> None:
    stored = quantized(Body()).manifest().to_dict()
    assert stored["format_version"] == FORMAT_VERSION
    with pytest.raises(CheckpointError, match=r"format_version=99.*this version reads 1"):
        Manifest.of_checkpoint({**stored, "format_version": 99})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"precision": "w3a8"}, "precision is 'w3a8', expected one of w4a8"),
        ({"raised": {"head": "int4"}}, "raised.head is 'int4', expected one of w4a8"),
        ({"calibrated": "yes"}, "calibrated is 'yes', expected true or false"),
        ({"range_estimator": {"a": {}, "b": {}}}, "range_estimator is .*, expected one name"),
        ({"range_estimator": 3}, "range_estimator is 3, expected"),
        ({"torch": None}, "torch is None, expected text"),
    ],
)
def test_the_damaged_entry_is_named(changed: dict[str, Any], message: str) -> None:
    stored = quantized(Body()).manifest().to_dict()
    with pytest.raises(CheckpointError, match=f"manifest in the checkpoint is damaged: {message}"):
        Manifest.of_checkpoint({**stored, **changed})


@pytest.mark.parametrize("name", ["precision", "hardware", "overrides", "torch"])
def test_a_missing_entry_is_named(name: str) -> None:
    stored = quantized(Body()).manifest().to_dict()
    del stored[name]
    with pytest.raises(CheckpointError, match=f"{name} is None, expected the entry to be there"):
        Manifest.of_checkpoint(stored)


@pytest.mark.parametrize(
    "spec", ["os.path.join", {"antigravity.X": {}}, {"percentile": {"percentile": 1}}, "unheard_of"]
)
def test_what_a_checkpoint_names_is_not_imported(spec: Any) -> None:
    stored = quantized(Body()).manifest().to_dict()
    with pytest.raises(CheckpointError, match="which cannot be made here"):
        quantized(Body()).take_over({**stored, "range_estimator": spec})
