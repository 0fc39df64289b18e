"""The recipe: plain values in, checked before AIMET is imported, and what makes two of them the same network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_quant.errors import ConfigurationError
from lightning_quant.precision import Precision
from lightning_quant.recipe import HARDWARE_CONFIGS, QuantRecipe
from lightning_quant.simulation import aimet


def test_hardware_configs_are_aimets_own() -> None:
    aimet.load()
    from aimet_torch.common.quantsim_config.quantsim_config import _config_file_aliases

    assert sorted(HARDWARE_CONFIGS) == sorted(_config_file_aliases)


def test_plain_strings_become_precisions() -> None:
    recipe = QuantRecipe(precision="w4a16", overrides={"head.*": "w8a16"})  # type: ignore[arg-type, dict-item]
    assert recipe.precision == Precision(4, 16)
    assert recipe.overrides == {"head.*": Precision(8, 16)}
    assert QuantRecipe(overrides=None).overrides == {}  # type: ignore[arg-type]


def test_checked_without_importing_torch_or_aimet() -> None:
    code = (
        "import sys; from lightning_quant.recipe import QuantRecipe; QuantRecipe(precision='w8a16', "
        "hardware='htp_v73'); print([name for name in ('torch', 'aimet_torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_json_file_as_hardware(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text("{}")
    identity = QuantRecipe(hardware=str(path)).identity()["hardware"]
    assert identity.startswith("mine.json (sha256 ")
    path.write_text(path.read_text() + " ")
    assert QuantRecipe(hardware=str(path)).identity()["hardware"] != identity
    with pytest.raises(ConfigurationError, match="path of an existing JSON file"):
        QuantRecipe(hardware=str(tmp_path / "none.json"))
    other = tmp_path / "mine.txt"
    other.write_text("{}")
    with pytest.raises(ConfigurationError, match="path of an existing JSON file"):
        QuantRecipe(hardware=str(other))


def test_typo_in_hardware_is_corrected() -> None:
    with pytest.raises(ConfigurationError, match=r"'htp_75'.*htp_v66.*Did you mean 'htp_v75'\?"):
        QuantRecipe(hardware="htp_75")
    with pytest.raises(ConfigurationError) as caught:
        QuantRecipe(hardware="tpu")
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"range_estimator": "minmax"}, "'minmax': expected one of min_max, tf_enhanced, percentile"),
        ({"calibration_samples": 0}, r"calibration_samples=0: expected a whole number of samples of at least 1"),
        ({"calibration_samples": 2.5}, r"calibration_samples=2\.5: expected a whole number"),
        ({"precision": "w3a8"}, r"'w3a8': expected one of w4a8"),
        ({"overrides": {"head": "int4"}}, r"'int4': expected one of w4a8"),
    ],
)
def test_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        QuantRecipe(**arguments)  # type: ignore[arg-type]


def test_identity_is_what_decides_the_integers() -> None:
    recipe = QuantRecipe(precision=Precision(8, 16), overrides={"a": Precision(4, 16)})
    expected = {"precision": "w8a16", "hardware": "htp_v75", "overrides": {"a": "w4a16"}}
    assert recipe.identity() == expected == json.loads(json.dumps(recipe.identity()))
    # how the ranges were found does not change what the network is
    same = QuantRecipe(
        precision=Precision(8, 16),
        overrides={"a": Precision(4, 16)},
        range_estimator={"percentile": {"percentile": 99}},  # type: ignore[arg-type]
    )
    assert same.identity() == expected
    assert QuantRecipe(precision=Precision(8, 16)).identity() != expected
