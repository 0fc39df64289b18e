"""Several input sizes of one network at AI Hub: apart, and linked into one context binary."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from lightning_quant.deploy.bundle import load_bundle
from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.push import Push, resume
from lightning_quant.deploy.samples import Samples
from lightning_quant.deploy.sizes import InputSize, sized_calls
from lightning_quant.deploy.targets.aihub.target import AiHubTarget
from lightning_quant.errors import ConfigurationError, DeviceError
from tests.aihub import faults
from tests.aihub.standin import StandIn
from tests.helpers.networks import Body, calibrated, call, images

pytestmark = pytest.mark.slow

S24 = "Samsung Galaxy S24"
SIZES = [[16, 12], [2, 3, 8, 8]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A bundle of three sizes, and samples of each."""
    network, calls = calibrated(Body()), [call(images(1, seed=seed)) for seed in (1, 2)]
    bundle = export_bundle(network, tmp_path_factory.mktemp("sizes") / "net", calls, sizes=SIZES)
    sized = sized_calls(network, InputSize.parse(SIZES), calls)
    further = {size: Samples.of(network, bundle.manifest, given.calls) for size, given in sized.items()}
    return bundle, Samples.of(network, bundle.manifest, calls), further


@pytest.fixture
def exported(made: Any, tmp_path: Path) -> Any:
    """The same in a folder without results."""
    bundle, samples, further = made
    return load_bundle(shutil.copytree(bundle.path, tmp_path / "net")), samples, further


def push(exported: Any, **options: Any) -> Any:
    options = {"compare_float": False, "patience": 2.0, "poll_seconds": 0.1, **options}
    return Push("aihub", [S24], 120, options).run(*exported)


def test_apart(hub: StandIn, exported: Any) -> None:
    measured = push(exported)
    assert [one.report.size for one in measured] == ["1x3x8x8", "16x12", "2x3x8x8"]
    for one in measured:
        assert one.report.status == "finished"
        assert one.report.against_simulation is not None
        assert one.report.against_simulation.psnr_db > 40
        assert (one.folder / one.report.artifacts["compiled"]).stat().st_size == one.report.bytes["compiled"]
    assert len({one.folder for one in measured}) == 3
    assert [len(hub.jobs(kind)) for kind in ("compile", "link", "inference")] == [3, 0, 3]
    assert hub.duplicates() == []


def test_linked(hub: StandIn, exported: Any) -> None:
    number = hub.inject(faults.lose_reply(), "POST jobs link")  # the reply is lost: it is not submitted twice
    measured = push(exported, runtimes=["qnn_context_binary"], link=True)
    assert hub.fired(number) == 1
    assert [len(hub.jobs(kind)) for kind in ("compile", "link", "inference")] == [3, 1, 3]
    assert hub.duplicates() == []
    for one in measured:
        assert one.report.against_simulation is not None
        assert one.report.against_simulation.psnr_db > 40
        assert set(one.report.jobs) == {"compile", "link", "inference"}
    files = {(one.folder / one.report.artifacts["compiled"]).read_bytes() for one in measured}
    assert len(files) == 1  # each has the whole binary


def test_linked_later(hub: StandIn, exported: Any) -> None:
    hub.hold("link")
    options = {"runtimes": ["qnn_context_binary"], "link": True, "wait": False}
    assert {one.report.status for one in push(exported, **options)} == {"pending"}
    hub.release("link")
    assert {one.report.status for one in resume(exported[0].path)} == {"finished"}
    assert [len(hub.jobs(kind)) for kind in ("compile", "link", "inference")] == [3, 1, 3]


@pytest.mark.parametrize("kind", ["compile", "link"])
def test_a_job_that_fails(hub: StandIn, exported: Any, kind: str) -> None:
    hub.inject(faults.fail("out of memory"), f"POST jobs {kind}")
    with pytest.raises(DeviceError, match=r"sizes cannot be linked.*out of memory|link job.*failed: out of memory"):
        push(exported, runtimes=["qnn_context_binary"], link=True)
    measured = push(exported, runtimes=["qnn_context_binary"], link=True)  # again: what failed only
    assert {one.report.status for one in measured} == {"finished"}
    assert len(hub.jobs(kind)) == (4 if kind == "compile" else 2)


def test_a_runtime_that_holds_one_graph() -> None:
    with pytest.raises(ConfigurationError, match=r"link=True with the runtime qnn_dlc: expected qnn_context_binary"):
        AiHubTarget([S24], link=True)
