"""The package as it is installed: the wheel holds the configuration and composes it from anywhere."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lightning_quant

ROOT = Path(__file__).resolve().parent.parent
GROUPS = sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name != "hydra")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built and installed without dependencies into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    return site


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_configuration_only(installed: Path) -> None:
    (wheel,) = installed.parent.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "lightning_quant/py.typed" in names
    assert "lightning_quant/conf/config.yaml" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"lightning_quant", "hydra_plugins"}


@pytest.mark.slow
def test_the_installed_plugin_serves_other_hydra_apps_and_loads_next_to_nothing(
    installed: Path, tmp_path: Path
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own/config.yaml").write_text("defaults: [_self_, {precision: w4a16}, {target: auto}]")
    script = f"""
import sys
sys.path.insert(0, {str(installed)!r})
import hydra
@hydra.main(config_path={str(tmp_path / "own")!r}, config_name="config", version_base="1.3")
def main(config):
    heavy = {{"numpy", "torch", "lightning", "aimet_torch"}} & sys.modules.keys()
    print(config.precision, config.target.target, sorted(heavy))
main()
"""
    # -P: not the checkout that this test runs in; -S would hide Hydra itself
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["w4a16 auto []"], done.stderr


@pytest.mark.slow
def test_every_configuration_composes_from_the_installed_wheel_in_another_folder(
    installed: Path, tmp_path: Path
) -> None:
    choices = [f"{group}={path.stem}" for group in GROUPS for path in sorted((ROOT / "conf" / group).glob("*.yaml"))]
    assert len(choices) > 20
    script = f"""
import sys
sys.path.insert(0, {str(installed)!r})
import lightning_quant
assert lightning_quant.__file__.startswith({str(installed)!r}), lightning_quant.__file__
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from lightning_quant.cli.configuration import config_dir
assert str(config_dir()).startswith({str(installed)!r}), config_dir()
with initialize_config_dir(str(config_dir()), version_base="1.3"):
    for choice in {choices!r}:
        config = compose("config", [choice, "data.root=x"])
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
print("composed", len({choices!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"composed {len(choices)}" in done.stdout


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, lightning_quant, lightning_quant.callbacks; dir(lightning_quant), dir(lightning_quant.callbacks)\n"
        "heavy = {'torch', 'aimet_torch', 'lightning', 'hydra', 'onnx', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there() -> None:
    assert sorted(lightning_quant.__all__) == sorted(lightning_quant._HOMES)
    for name in lightning_quant.__all__:
        assert getattr(lightning_quant, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = lightning_quant.nonsense


def test_callbacks_are_found_among_callbacks() -> None:
    from lightning_quant import callbacks

    assert set(callbacks.__all__) <= set(lightning_quant.__all__)
    for name in callbacks.__all__:
        assert getattr(callbacks, name) is getattr(lightning_quant, name)
    with pytest.raises(AttributeError, match=r"'lightning_quant\.callbacks' has no attribute 'nonsense'"):
        _ = callbacks.nonsense


def test_the_lock_pins_what_the_constraints_say_with_hashes() -> None:
    """`make lock` was run after the last change of pyproject.toml and constraints.txt."""
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    entries = re.split(r"\n(?=\S)", (ROOT / "requirements.txt").read_text().strip())
    locked = {canonicalize_name(entry.partition("==")[0]): entry for entry in entries}
    for name, version in pinned.items():
        entry = locked[canonicalize_name(name)]
        assert re.match(rf"\S+=={re.escape(version)}[ \n]", entry), entry.splitlines()[0]
    assert all("--hash=sha256:" in entry for entry in entries)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    installed = ("dev", "docs", "launchers", "datasets", "qnn")
    wanted = [*project["dependencies"], *(one for name in installed for one in extras[name])]
    for requirement in map(Requirement, wanted):
        version = locked[canonicalize_name(requirement.name)].split("==")[1].split()[0]
        assert requirement.specifier.contains(version, prereleases=True), requirement
