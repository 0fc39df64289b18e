"""Pixels in and classes out at AI Hub: the compiled model has the types, layout and options that the contract says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qai_hub import Client

from lightning_quant.deploy.edges.app import plan_of
from lightning_quant.deploy.edges.contract import Contract
from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.push import Push
from lightning_quant.deploy.samples import Samples
from tests.aihub.standin import StandIn
from tests.deploy.targets.aihub.test_link import S24
from tests.helpers.networks import Body, calibrated, call, images

pytestmark = pytest.mark.slow

EDGES = {
    "pixels": ({"mean": 0.5, "std": 0.25}, "argmax", np.uint8),
    "integers": ("quantized", "quantized", np.uint16),
    "probabilities": ({"mean": 0.5, "std": 0.25, "layout": "nchw"}, "softmax", np.float32),
}


@pytest.mark.parametrize("edges", EDGES)
def test_what_is_compiled_is_what_the_contract_says(hub: StandIn, tmp_path: Path, edges: str) -> None:
    inputs, outputs, kind = EDGES[edges]
    whole = [(one * 255).round().clamp(0, 255) / 255 for one in (images(8).sigmoid(), images(2, seed=1).sigmoid())]
    seen = [call((one - 0.5) / 0.25) for one in whole]
    network = calibrated(Body(), seen[0], precision="w8a16")
    bundle = export_bundle(network, tmp_path / "net", seen[1:], inputs=inputs, outputs=outputs)
    app = bundle.app
    assert app is not None
    given = seen[1].first(1)
    samples = [Samples.of(network, bundle.manifest, [given], plan) for plan in (None, plan_of(app))]
    measured = Push("aihub", [S24], 120, {"compare_float": False, "poll_seconds": 0.1}).run(
        bundle, samples[0], {"app": samples[1]}
    )
    own, with_edges = (one.report for one in measured)
    assert (own.size, own.edged, with_edges.size, with_edges.edged) == (None, False, "app", True)
    assert own.against_simulation is not None
    assert own.against_simulation.psnr_db > 55
    # the same classes and numbers as the host's own work around the simulation
    assert with_edges.against_simulation is not None
    assert with_edges.against_simulation.argmax_agreement in (None, 1.0) or with_edges.against_simulation.psnr_db > 55
    contract = Contract.read(bundle.path)
    assert measured[1].outputs[0].keys() == {one.name for one in contract.outputs}
    assert {value.dtype for value in measured[1].outputs[0].values()} == {np.dtype(kind)}
    client = Client()
    # of the app the file itself says what are integers
    jobs = [client.get_job(one.report.jobs["compile"].strip("/").rpartition("/")[2]) for one in measured]
    assert ["--quantize_io" in job.options for job in jobs] == [True, False]
    target = jobs[1].get_target_model()
    for part, spec in (("inputs", target.input_spec), ("outputs", target.output_spec)):
        known = {one.name: (tuple(one.shape), np.dtype(one.dtype)) for specs in spec.values() for one in specs}
        tensors: Any = getattr(contract, part)
        assert known == {one.name: (one.shape, np.dtype(one.type)) for one in tensors}
