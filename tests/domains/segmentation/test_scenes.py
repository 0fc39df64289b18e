import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_quant.domains.segmentation.cityscapes import CLASS_NAMES, CityscapesDataset, to_train_ids
from lightning_quant.domains.segmentation.scenes import MANIFEST, draw_scene, generate_scenes
from lightning_quant.errors import ConfigurationError, DataError

SMALL = {"height": 32, "width": 64}


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*.png")}


def test_scenes_have_the_layout_of_cityscapes(tmp_path: Path) -> None:
    generate_scenes(tmp_path, train=3, val=2, **SMALL)
    assert len(CityscapesDataset(tmp_path, "train")) == 3
    dataset = CityscapesDataset(tmp_path, "val")
    assert len(dataset) == 2
    image, target = dataset[0]
    assert image.shape == (3, 32, 64)
    assert set(target.unique().tolist()) <= {*range(19), 255}


def test_a_scene_depends_on_seed_split_and_index_only(tmp_path: Path) -> None:
    few = contents(generate_scenes(tmp_path / "few", train=2, val=1, **SMALL))
    more = contents(generate_scenes(tmp_path / "more", train=4, val=2, **SMALL))
    assert few.items() <= more.items()
    assert len(set(more.values())) == len(more)  # no two alike, not even train 0 and val 0
    other = contents(generate_scenes(tmp_path / "other", train=2, val=1, seed=1, **SMALL))
    assert not set(few.values()) & set(other.values())


def test_scenes_show_streets() -> None:
    counts, above, below = np.zeros(256, int), np.zeros(256, int), np.zeros(256, int)
    brightness = []
    for index in range(40):
        photo, label_ids = draw_scene(64, 128, seed=0, split="train", index=index)
        assert (photo.mode, label_ids.mode) == ("RGB", "L")
        assert photo.size == label_ids.size == (128, 64)
        train_ids = to_train_ids(np.asarray(label_ids))
        counts += np.bincount(train_ids.ravel(), minlength=256)
        above += np.bincount(train_ids[:16].ravel(), minlength=256)
        below += np.bincount(train_ids[48:].ravel(), minlength=256)
        brightness.append(np.asarray(photo).mean())
    absent = {name for name, count in zip(CLASS_NAMES, counts, strict=False) if not count}
    assert absent == {"train", "motorcycle"}
    road, sky = CLASS_NAMES.index("road"), CLASS_NAMES.index("sky")
    assert below[road] > 0.5 * below.sum()
    assert above[sky] > 0.1 * above.sum()
    assert above[road] == below[sky] == 0
    assert np.std(brightness) > 10  # day and dusk


def test_another_size_shows_the_same_street() -> None:
    _, small = draw_scene(64, 128, seed=0, split="train", index=3)
    _, large = draw_scene(128, 256, seed=0, split="train", index=3)
    same = np.asarray(small) == np.asarray(large.resize((128, 64), Image.Resampling.NEAREST))
    assert same.mean() > 0.9


def test_a_second_call_does_nothing(tmp_path: Path) -> None:
    generate_scenes(tmp_path, train=2, val=1, **SMALL)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    generate_scenes(tmp_path, train=2, val=1, **SMALL)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}


def test_other_parameters_need_another_folder(tmp_path: Path) -> None:
    generate_scenes(tmp_path, train=2, val=1, **SMALL)
    with pytest.raises(DataError, match=r"'train': 2.*'train': 3.*Pass another folder, or delete"):
        generate_scenes(tmp_path, train=3, val=1, **SMALL)


def test_scenes_of_another_generator_are_refused(tmp_path: Path) -> None:
    generate_scenes(tmp_path, train=1, val=1, **SMALL)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "generator": 0}))
    with pytest.raises(DataError, match="'generator': 0"):
        generate_scenes(tmp_path, train=1, val=1, **SMALL)


def test_a_damaged_manifest_is_reported(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(DataError, match=r"scenes\.json cannot be read"):
        generate_scenes(tmp_path, train=1, val=1, **SMALL)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "leftImg8bit").mkdir()
    with pytest.raises(DataError, match=r"holds files but no scenes\.json"):
        generate_scenes(tmp_path, train=1, val=1, **SMALL)


@pytest.mark.parametrize("arguments", [{"train": -1}, {"height": 16}])
def test_bad_arguments_are_refused(tmp_path: Path, arguments: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="at least 32x32"):
        generate_scenes(tmp_path / "scenes", **arguments)
    assert not (tmp_path / "scenes").exists()


def test_a_killed_generation_is_resumed(tmp_path: Path) -> None:
    root = tmp_path / "scenes"
    code = f"from lightning_quant.domains.segmentation.scenes import *; generate_scenes({str(root)!r}, 5000, 0)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[3])
    photos = root / "leftImg8bit" / "train" / "synthetic"
    deadline = time.monotonic() + 60
    while len(list(photos.glob("*_leftImg8bit.png"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = contents(root)
    CityscapesDataset(root, "train")  # every photograph that is there has its labels
    for path in root.rglob("*Ids.png"):
        Image.open(path).load()

    # The same number that was asked for would take too long here, so ask for just a few more.
    manifest = json.loads((root / MANIFEST).read_text())
    done = len(list(photos.glob("*_leftImg8bit.png")))
    (root / MANIFEST).write_text(json.dumps({**manifest, "train": done + 2}))
    generate_scenes(root, done + 2, 0)
    fresh = contents(generate_scenes(tmp_path / "fresh", done + 2, 0))
    resumed = {name: data for name, data in contents(root).items() if not Path(name).name.startswith(".")}
    assert resumed == fresh
    assert {n for n in finished if not Path(n).name.startswith(".")} <= resumed.keys()
