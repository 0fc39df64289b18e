"""Range estimators: by name, with options, as instances; AIMET's, and one of a user's own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from omegaconf import OmegaConf
from torch import Tensor

import lightning_quant as lq
from lightning_quant.cli.configuration import config_dir
from lightning_quant.errors import CalibrationError, CheckpointError, ConfigurationError
from lightning_quant.recipe import QuantRecipe
from lightning_quant.simulation import aimet
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.calibration_cache import StatisticsCache
from lightning_quant.simulation.range_estimators import ESTIMATORS, Percentile, RangeEstimator
from tests.helpers.estimators import Deviations
from tests.helpers.networks import Body, call, images, quantized
from tests.helpers.small import SmallModule, assert_same_tensors, encodings, small_loader

MakeTrainer = Callable[..., Trainer]
PATH = "tests.helpers.estimators.Deviations"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("percentile", Percentile()),
        ({"percentile": {"percentile": 99.9}}, Percentile(99.9)),
        ({"percentile": {}}, Percentile()),
        ("deviations", Deviations()),
        ({"deviations": {"count": 2.0}}, Deviations(2.0)),
        (PATH, Deviations()),
        ({PATH: {"count": 2.0}}, Deviations(2.0)),
        (Deviations(2.0), Deviations(2.0)),
    ],
)
def test_name_path_and_instance(given: Any, expected: RangeEstimator) -> None:
    assert RangeEstimator.parse(given) == expected
    assert RangeEstimator.parse(expected.spec) == expected


def test_only_options_that_were_changed_are_in_the_spec() -> None:
    assert Percentile().spec == "percentile" == str(Percentile())
    assert Percentile(99).spec == {"percentile": {"percentile": 99}}
    assert str(Percentile(99)) == "percentile(percentile=99)"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("minmax", r"Unknown range estimator 'minmax': expected one of min_max, .*Did you mean 'min_max'"),
        ({"percentile": {"percentile": 0.99}}, r"percentile=0\.99: expected a share between 50 and 100"),
        ({"percentile": {"percentile": 101}}, r"percentile=101: expected"),
        ({"percentile": {"percentile": "most"}}, "'percentile' with options .*'most'"),
        ({"min_max": {"percentile": 99}}, "'min_max' with options .*unexpected keyword argument"),
        (
            {"min_max": {}, "percentile": {}},
            "expected a name, the dotted path of a class, one of them with",
        ),
        ({"percentile": 99.9}, "expected a name, the dotted path of a class, one of them with"),
        (3, "expected a name, the dotted path of a class, one of them with"),
        ("nowhere.Deviations", "'nowhere.Deviations' cannot be imported: No module named 'nowhere'"),
        ("tests.helpers.estimators.Nothing", "cannot be imported: .*no attribute 'Nothing'"),
        ("torch.nn.ReLU", r"is not a subclass of lightning_quant\.RangeEstimator"),
        (Deviations(count=torch.ones(1)), "options of the range estimator 'deviations' do not go into a checkpoint"),
    ],
)
def test_refuses(given: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        QuantRecipe(range_estimator=given)


def test_names_that_are_taken_or_cannot_be() -> None:
    for taken in ("min_max", "deviations"):
        with pytest.raises(
            ConfigurationError, match=rf"Mine is named '{taken}', as .*\.(MinMax|Deviations) is: expected"
        ):

            class Mine(RangeEstimator):
                name = taken

                def ends(self, counts: Tensor, edges: Tensor) -> tuple[float, float]:
                    return 0.0, 1.0

    with pytest.raises(ConfigurationError, match=r"name is 'os\.path': expected a word"):

        class Path(RangeEstimator):
            name = "os.path"

            def ends(self, counts: Tensor, edges: Tensor) -> tuple[float, float]:
                return 0.0, 1.0


def test_the_same_class_may_be_defined_again() -> None:  # a script and its import, a cell of a notebook
    def define(end: float) -> type[RangeEstimator]:
        class Again(RangeEstimator):
            name = "again"

            def ends(self, counts: Tensor, edges: Tensor) -> tuple[float, float]:
                return 0.0, end

        return Again

    define(1.0)
    assert type(RangeEstimator.parse("again")) is not define(2.0)
    assert RangeEstimator.parse("again").ends(torch.ones(1), torch.ones(2)) == (0.0, 2.0)


def test_a_class_that_computes_nothing_is_refused_when_it_is_defined() -> None:
    with pytest.raises(ConfigurationError, match=r"Unfinished has no ends\(self, counts, edges\)"):

        class Unfinished(RangeEstimator):
            name = "unfinished"

    with pytest.raises(ConfigurationError, match="expected one of"):
        RangeEstimator.parse("unfinished")


def test_options_that_a_checkpoint_would_lose_are_refused() -> None:
    class Shrunk(RangeEstimator):
        name = "shrunk"

        def __init__(self, share: float = 1.0) -> None:
            self.share = share

        def ends(self, counts: Tensor, edges: Tensor) -> tuple[float, float]:
            return float(edges[0]) * self.share, float(edges[-1]) * self.share

    for given in (Shrunk(0.5), "shrunk"):
        with pytest.raises(ConfigurationError, match="'shrunk' keeps share, which no checkpoint would hold"):
            QuantRecipe(range_estimator=given)


def test_ranges_are_those_of_the_estimator() -> None:
    data = images(8)
    network = quantized(Body(), range_estimator=Deviations(2.0))
    calibrate(network, [call(data)])
    quantizer = network.network.conv.input_quantizers[0]
    low, high = data.mean() - 2 * data.std(), data.mean() + 2 * data.std()
    assert quantizer.get_min().item() == pytest.approx(float(low), abs=0.05)
    assert quantizer.get_max().item() == pytest.approx(float(high), abs=0.05)
    weight = network.network.conv.param_quantizers["weight"]
    assert torch.equal(weight.get_offset(), torch.zeros_like(weight.get_offset()))  # symmetric, one range per channel
    assert weight.get_scale().numel() > 1
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(network))(data), copy.deepcopy(network)(data))


def test_it_is_as_good_as_aimets_where_both_say_the_same() -> None:
    @dataclass(frozen=True)
    class Trimmed(RangeEstimator):
        name = "trimmed"

        def ends(self, counts: Tensor, edges: Tensor) -> tuple[float, float]:
            total = counts.cumsum(0)
            low, high = (torch.searchsorted(total, total[-1] * share / 100) for share in (100 - 99, 99))
            return float(edges[low]), float(edges[high])

    found = []
    for estimator in (Trimmed(), Percentile(99)):
        network = quantized(Body(), range_estimator="tf_enhanced")
        network.set_range_estimator(estimator)  # for every quantizer; AIMET's own scheme spares some
        calibrate(network, [call(images(8)), call(images(8, seed=9))])
        found.append(encodings(network))
    mine, aimets = found
    assert mine.keys() == aimets.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], aimets[name], rtol=0, atol=0)


def test_the_calibration_cache_serves_it(tmp_path: Path) -> None:
    found = []
    for cache in (None, StatisticsCache(tmp_path), StatisticsCache(tmp_path)):
        network = quantized(Body(), range_estimator="deviations")
        calibrate(network, [call(images(8))], cache=cache)
        found.append(encodings(network))
    assert len(list(tmp_path.glob("*.npz"))) == 1
    for other in found[1:]:
        assert_same_tensors(other, found[0])


@pytest.mark.parametrize("ends", [(1.0, -1.0), (0.0, float("nan")), (float("-inf"), 1.0)])
def test_ends_that_cannot_be(ends: tuple[float, float]) -> None:
    class Wrong(RangeEstimator):
        name = "wrong"

        def ends(self, counts: Tensor, edges: Tensor) -> tuple[float, float]:
            return ends

    network = quantized(Body(), range_estimator=Wrong())
    with pytest.raises(CalibrationError, match=r"The range estimator 'wrong' returned a range from .* to "):
        calibrate(network, [call(images(8))])
    assert not network.calibrated


def test_in_a_callback_and_back_from_its_checkpoint(trainer: MakeTrainer, tmp_path: Path) -> None:
    module, path = SmallModule(), tmp_path / "last.ckpt"
    one = trainer(lq.PostTrainingQuantization(range_estimator=Deviations(2.5)))
    one.fit(module, small_loader())
    one.save_checkpoint(path)
    assert lq.read_manifest(path)["range_estimator"] == {"deviations": {"count": 2.5}}
    assert_same_tensors(lq.load_quantized(SmallModule, path).state_dict(), module.state_dict())
    known = ESTIMATORS._registered.pop("deviations")
    try:
        with pytest.raises(CheckpointError, match=r"range_estimator=.*deviations.*import the module that defines it"):
            lq.load_quantized(SmallModule, path)
    finally:
        ESTIMATORS._registered["deviations"] = known


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("quantizer.range_estimator={percentile:{percentile:99.9}}", Percentile(99.9)),
        (f"quantizer.range_estimator={PATH}", Deviations()),
        ("quantizer.range_estimator={" + PATH + ":{count:2.5}}", Deviations(2.5)),
    ],
)
def test_from_the_command_line(override: str, expected: RangeEstimator) -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("config", [override])
    values: Any = OmegaConf.to_container(config.quantizer)
    assert lq.PostTrainingQuantization(**values).recipe.range_estimator == expected


def test_percentile_spares_what_aimets_scheme_spares() -> None:
    network = quantized(Body(), range_estimator={"percentile": {"percentile": 99.9}})
    kinds = {
        name: type(one.encoding_analyzer)
        for name, one in network.network.named_modules()
        if "." in name and hasattr(one, "encoding_analyzer")
    }
    spared = {name for name, kind in kinds.items() if issubclass(kind, aimet.MinMaxEncodingAnalyzer)}
    assert spared == {name for name in kinds if ".relu" in name and "output" in name} != set()
    assert {
        one.encoding_analyzer.percentile for one in network.quantizers() if hasattr(one.encoding_analyzer, "percentile")
    } == {99.9}


class Plain(SmallModule):
    """Without arguments."""

    def __init__(self) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"percentile": {"percentile": 99.9}}, Percentile(99.9)),
        ({PATH: {"count": 2.5}}, Deviations(2.5)),
        ({"class_path": PATH, "init_args": {"count": 2.0}}, Deviations(2.0)),
    ],
)
def test_from_lightnings_command_line(given: Any, expected: RangeEstimator) -> None:
    callback = {"class_path": "lightning_quant.PostTrainingQuantization", "init_args": {"range_estimator": given}}
    trainer = {"accelerator": "cpu", "logger": False, "callbacks": [callback]}
    cli = LightningCLI(Plain, args={"trainer": trainer}, run=False, save_config_callback=None)
    (made,) = [one for one in cli.trainer.callbacks if isinstance(one, lq.PostTrainingQuantization)]
    assert made.recipe.range_estimator == expected
