import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from lightning_quant.domains.segmentation.images import choose, find_images
from lightning_quant.errors import ConfigurationError, DataError


def write(path: Path, red: int, size: tuple[int, int] = (16, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (red, 0, 0)).save(path)
    return path


def reds(images: torch.utils.data.Dataset) -> list[int]:
    """The red of each image, which tells the files apart."""
    return [round((images[i][0, 0, 0].item() * 0.229 + 0.485) * 255) for i in range(len(images))]


@pytest.fixture
def urban(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local copy of a data set in the form of UrbanSyn: pictures, and other things beside them."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "UrbanSyn"
    for i in (3, 1, 2):
        write(root / "rgb" / f"rgb_000{i}.png", red=10 * i)
    write(root / "rgb" / "rgb_0100.png", red=200)
    write(root / "ss" / "ss_0001.png", red=250)
    write(root / "depth" / "depth_0001.png", red=251)
    return root


def test_a_folder_is_searched_recursively_in_order_of_paths(tmp_path: Path) -> None:
    write(tmp_path / "b.png", 20)
    write(tmp_path / "a" / "deep" / "z.PNG", 10)
    write(tmp_path / "c.bmp", 30)
    write(tmp_path / "d.webp", 40)
    write(tmp_path / "e.jpg", 50)
    (tmp_path / "notes.txt").write_text("no image")
    images = find_images(tmp_path)
    assert len(images) == 5
    assert reds(images)[:3] == [10, 20, 30]
    assert (images[0].shape, images[0].dtype, type(images[0])) == ((3, 8, 16), torch.float32, torch.Tensor)
    assert find_images(tmp_path, size=(4, 6))[0].shape == (3, 4, 6)


def test_gray_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 255).save(tmp_path / "gray.png")
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(tmp_path / "transparent.png")
    gray, transparent = find_images(tmp_path)
    assert torch.equal(gray, transparent)


def test_a_pattern_selects_files_of_a_data_set(urban: Path) -> None:
    assert reds(find_images(str(urban), "rgb/*_00*.png")) == [10, 20, 30]


def test_a_saved_data_set_with_an_image_column_is_read(urban: Path, tmp_path: Path) -> None:
    import datasets

    files = sorted(str(p) for p in (urban / "rgb").iterdir())
    table = datasets.Dataset.from_dict({"id": [4, 5, 6, 7], "photo": files})
    table = table.cast_column("photo", datasets.Image())
    table.save_to_disk(tmp_path / "saved")
    assert reds(find_images(tmp_path / "saved")) == [10, 20, 30, 200]
    datasets.DatasetDict(test=table.select([3]), train=table.select([1])).save_to_disk(tmp_path / "splits")
    assert reds(find_images(tmp_path / "splits")) == [20]


def test_a_data_set_of_parquet_files_is_read(urban: Path, tmp_path: Path) -> None:
    import datasets

    files = sorted(str(p) for p in (urban / "rgb").iterdir())
    table = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    (tmp_path / "repo" / "data").mkdir(parents=True)
    table.to_parquet(tmp_path / "repo" / "data" / "train-00000-of-00001.parquet")
    assert reds(find_images(tmp_path / "repo")) == [10, 20, 30, 200]


def test_a_data_set_without_images_says_which_columns_it_has(urban: Path, tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"caption": ["a street"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"no column of images.*caption"):
        find_images(tmp_path / "saved")


def test_a_pattern_that_matches_nothing_is_reported(urban: Path) -> None:
    with pytest.raises(DataError, match=r"No images found in .*UrbanSyn' with the pattern 'rgb/\*\.tiff'"):
        find_images(urban, "rgb/*.tiff")


def test_a_source_that_does_not_exist_is_reported(urban: Path) -> None:
    with pytest.raises(DataError, match=r"No images found in .*nowhere.*Expected a folder"):
        find_images(urban / "nowhere")


def test_an_empty_folder_is_reported(urban: Path) -> None:
    (urban / "empty").mkdir()
    with pytest.raises(DataError, match=r"No images found in .*empty"):
        find_images(urban / "empty")


def test_without_the_package_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # what Python does when an import is to fail
    with pytest.raises(ConfigurationError, match=r"pip install 'lightning-quant\[datasets\]'"):
        find_images("UrbanSyn/UrbanSyn", "rgb/*_00*.png")
    write(tmp_path / "a.png", 10)
    assert len(find_images(tmp_path)) == 1  # a folder needs no package


def test_a_corrupt_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "broken.png", 10)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match=r"broken\.png cannot be read as an image"):
        find_images(tmp_path)[0]


def test_a_corrupt_file_of_a_data_set_is_named(urban: Path) -> None:
    images = find_images(urban, "rgb/*_00*.png")
    (urban / "rgb" / "rgb_0002.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(DataError, match=r"rgb_0002\.png \(row 1 of .*UrbanSyn\) cannot be read"):
        images[1]


def test_the_choice_depends_on_the_seed_only() -> None:
    few, held = choose(100, 10, held_out=5, seed=3)
    more, held_again = choose(100, 30, held_out=5, seed=3)
    assert more[:10] == few
    assert held == held_again
    assert not set(more) & set(held)
    assert choose(100, 10, held_out=5, seed=4)[0] != few
    everything, held = choose(7, 256, held_out=2)
    assert sorted(everything + held) == list(range(7))


def test_holding_out_everything_is_refused() -> None:
    with pytest.raises(DataError, match="Holding out 5 of 5 images leaves none"):
        choose(5, 1, held_out=5)
