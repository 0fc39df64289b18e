"""The program in Python, run as an app's developer runs it: a copy in a bundle, a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_quant.deploy.edges.contract import ClassLabel, Contract
from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.hosts import host
from lightning_quant.deploy.hosts.write import write_hosts
from tests.helpers.handmade_bundles import HEIGHT, LABELS, WIDTH, Ends, photos, scores_of, write_app, write_numbers
from tests.helpers.networks import Body, calibrated, call
from tests.helpers.qdq import NO_EMULATOR


def run(bundle: Path, contract: Contract, *arguments: Any, status: int = 0) -> str:
    """Run the program in a folder of its own, where no package of ours is found; what it printed."""
    write_hosts(bundle, contract)
    command = [sys.executable, "-P", str(bundle / "host/host.py"), *map(str, arguments)]
    # -S would hide its own libraries; this hides ours
    done = subprocess.run(command, cwd=bundle, capture_output=True, text=True, check=False, env={"PATH": ""})
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("ends", get_args(Ends))
def test_classes_of_pixels_are_drawn_in_the_colors_of_the_contract(tmp_path: Path, ends: Ends) -> None:
    contract = write_app(tmp_path / "net", ends)
    (photo,) = photos(tmp_path, 1)
    said = run(tmp_path / "net", contract, photo, "--raw")
    assert said == f"{photo}: predictions/photo0.png\n"
    rgb = np.asarray(Image.open(photo))
    classes = scores_of(rgb).argmax(0)
    drawn = np.asarray(Image.open(tmp_path / "net/predictions/photo0.png"))
    times = drawn.shape[1] // WIDTH
    assert times == 26  # so that the legend can be read
    colors = np.float32([(255, 0, 0), (0, 255, 0), (0, 0, 255), host.class_color(contract.to_dict(), 3)])
    assert len(np.unique(classes)) == 4
    expected = np.rint((rgb + colors[classes]) / 2)
    assert np.array_equal(drawn[: times * HEIGHT : times, ::times], expected)
    legend = drawn[times * HEIGHT :].reshape(-1, 3)
    assert all((legend == color).all(1).any() for color in colors)


def test_a_real_bundle_gives_the_classes_of_the_simulation_sample_by_sample(tmp_path: Path) -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    sizes = (8, 8, 3)
    pictures = [np.random.default_rng(seed).integers(0, 256, sizes, dtype=np.uint8) for seed in range(4)]
    inputs = [
        (torch.from_numpy(one).permute(2, 0, 1)[None] / 255 - torch.tensor(mean).view(-1, 1, 1))
        / torch.tensor(std).view(-1, 1, 1)
        for one in pictures
    ]
    network = calibrated(Body(), call(torch.cat(inputs)))
    calls = [call(one) for one in inputs]
    paths = [tmp_path / f"{index}.png" for index in range(4)]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    app: dict[str, Any] = {"inputs": {"mean": mean, "std": std, "color": "bgr"}, "outputs": "argmax"}
    plain = export_bundle(network, tmp_path / "plain", calls)
    pixels = export_bundle(network, tmp_path / "pixels", calls, **app)
    run(plain.path, Contract.read(plain.path), *paths, "--raw", "--mean", *mean, "--std", *std)
    run(pixels.path, Contract.read(pixels.path), *paths, "--raw")
    for path, one in zip(paths, inputs, strict=True):
        simulated = network.network(one).detach().numpy()
        with np.load(plain.path / f"predictions/{path.stem}.raw.npz") as file:
            (computed,) = file.values()
        assert np.abs(computed - simulated).max() < 1e-4
        with np.load(pixels.path / f"predictions/{path.stem}.raw.npz") as file:
            (classes,) = file.values()
        assert np.array_equal(classes, simulated.argmax(1))


@pytest.mark.parametrize("ends", get_args(Ends))
def test_classes_of_an_image_are_ranked(tmp_path: Path, ends: Ends) -> None:
    contract = write_app(tmp_path / "net", ends, mean=True, labels=LABELS[:3])
    Image.new("RGB", (WIDTH, HEIGHT), (255, 51, 0)).save(tmp_path / "red.png")
    said = run(tmp_path / "net", contract, tmp_path / "red.png")
    known = {"classes": "red", "top_k": "red 1, class 3 0.251"}
    assert said.rpartition(": ")[2] == known.get(ends, "red 1, class 3 0.251, green 0.2, blue 0") + "\n"


@pytest.mark.parametrize("color", ["rgb", "bgr"])
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_pixels_come_in_the_layout_and_order_of_the_contract(tmp_path: Path, layout: Any, color: Any) -> None:
    contract = write_app(tmp_path, layout=layout, color=color).to_dict()
    (photo,) = photos(tmp_path, 1)
    session = host.open_session(tmp_path / contract["file"])
    with Image.open(photo) as image:
        given = host.pixels(image, contract["inputs"][0])
    (classes,) = session.run(None, {"image": given})
    assert np.array_equal(classes[0], scores_of(np.asarray(Image.open(photo))).argmax(0))


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (1, 5)])
def test_arrays_go_in_and_numbers_come_out(tmp_path: Path, shape: tuple[int, ...]) -> None:
    contract = write_numbers(tmp_path / "net", "uint8", shape)
    halves = np.random.default_rng(0).integers(-3, 20, shape).astype(np.float32) / 2
    np.save(tmp_path / "x.npy", halves[0])
    np.savez(tmp_path / "z.npz", x=halves)
    run(tmp_path / "net", contract, tmp_path / "x.npy", tmp_path / "z.npz")
    for name in ("x", "z"):
        with np.load(tmp_path / f"net/predictions/{name}.npz") as file:
            assert np.array_equal(file["y_0"], halves)


def test_one_bad_file_costs_none_of_the_others(tmp_path: Path) -> None:
    contract = write_app(tmp_path / "net")
    good, bad = photos(tmp_path)
    bad.write_bytes(bad.read_bytes()[:60])
    np.save(tmp_path / "wrong.npy", np.zeros((4, 4), np.uint8))
    said = run(tmp_path / "net", contract, bad, tmp_path / "wrong.npy", good, status=1)
    assert f"{good}: predictions/photo0.png" in said
    assert re.search(f"{bad}: .*truncated|{bad}: .*identify", said)
    assert "it is of shape [4, 4], expected [1, 6, 10, 3]" in said


def test_floats_want_an_array_or_what_to_normalize_by(tmp_path: Path) -> None:
    contract = write_numbers(tmp_path / "net")
    assert "expected an .npy file, or --mean and --std" in run(
        tmp_path / "net", contract, *photos(tmp_path, 1), status=1
    )


def made_of(mode: str) -> Image.Image:
    """A ramp in some mode."""
    ramp = np.arange(0, 240, 4, dtype=np.uint8).reshape(HEIGHT, WIDTH)
    if mode == "I;16":
        return Image.fromarray(ramp.astype(np.uint16) * 257)
    if mode == "RGBA":
        return Image.fromarray(np.dstack([ramp, ramp, ramp, 255 - ramp]))
    return Image.fromarray(ramp).convert(mode)


@pytest.mark.parametrize("mode", ["L", "I;16", "RGB", "RGBA", "LA", "CMYK", "YCbCr"])
def test_images_of_any_mode_are_the_same_pixels(tmp_path: Path, mode: str) -> None:
    tensor = write_app(tmp_path).to_dict()["inputs"][0]
    (gray,) = host.pixels(host.upright(made_of(mode)), tensor)
    assert np.abs(gray.astype(int) - np.asarray(made_of("L"))[..., None]).max() <= (2 if mode == "YCbCr" else 0)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_known_range_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match="of 32 bits"):
        host.upright(Image.new(mode, (4, 4)))


def test_a_photograph_is_turned_as_it_was_taken() -> None:
    photo = Image.fromarray(np.zeros((4, 8), np.uint8))
    photo.getexif()[0x0112] = 6
    assert host.upright(photo).size == (4, 8)


def test_colors_of_classes_without_one_differ() -> None:
    contract = {"classes": [{"name": "a", "color": None}] * 3}
    colors = [host.class_color(contract, index) for index in range(256)]
    assert colors[:3] == [(128, 0, 0), (0, 128, 0), (128, 128, 0)]  # PASCAL VOC's, without the background
    assert len(set(colors)) > 250


def test_pixels_of_no_class_stay_as_they_are() -> None:
    photo = Image.new("RGB", (256, 2), (9, 9, 9))
    drawn = host.overlay(photo, np.uint8([[0, 255]]), {"classes": [{"name": "a", "color": "#ffffff"}]})
    assert drawn.getpixel((0, 0)) == (132, 132, 132)
    assert drawn.getpixel((255, 0)) == (9, 9, 9)


def test_results_of_files_of_one_name_are_kept_apart() -> None:
    paths = [Path("a/x.png"), Path("b/x.png"), Path("x-2.jpg"), Path("x.jpg")]
    assert list(host.free_names(paths).values()) == ["x", "x-2", "x-2-2", "x-3"]


@pytest.mark.slow
@pytest.mark.skipif(NO_EMULATOR is not None, reason=str(NO_EMULATOR))
def test_it_runs_on_the_emulated_npu(tmp_path: Path) -> None:
    contract = write_app(tmp_path / "net", "codes", labels=(ClassLabel("red"),))
    (photo,) = photos(tmp_path, 1)
    run(tmp_path / "net", contract, photo, "--provider", "qnn", "--soc", "SM8650", "--raw")
    with np.load(tmp_path / "net/predictions/photo0.raw.npz") as file:
        (codes,) = file.values()
    expected = scores_of(np.asarray(Image.open(photo)))
    assert np.abs(codes[0] / 255 - expected).max() < 2 / 255
