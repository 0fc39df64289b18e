"""Fixtures for everything that talks to the stand-in."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import qai_hub

import lightning_quant as lq
from lightning_quant.deploy.bundle import Bundle, load_bundle
from tests.aihub.speed import speed_up
from tests.aihub.standin import StandIn
from tests.helpers.small import SmallModule, small_loader
from tests.helpers.trainers import quiet_trainer


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Real exports of the small network, by precision."""
    made = {}
    for precision in ("w8a8", "w8a16", "w4a8"):
        path = tmp_path_factory.mktemp(precision) / "small"
        callbacks = [lq.PostTrainingQuantization(precision), lq.DeviceExport(path.parent, name="small")]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quiet_trainer(path.parent, *callbacks, max_epochs=1).fit(SmallModule(), small_loader(), small_loader())
        made[precision] = load_bundle(path)
    return made


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[StandIn]:
    with speed_up(), StandIn(tmp_path / "hub", "t0ken") as hub:
        yield hub


@pytest.fixture
def client(hub: StandIn) -> qai_hub.Client:
    return qai_hub.Client(hub.config())
