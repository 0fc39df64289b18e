"""``lightning-quant predict BUNDLE IMAGE...``: what an exported network sees in photographs."""

from __future__ import annotations

import argparse
import csv
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lightning_quant.deploy.edges.contract import CONTRACT_NAME, Contract, IoTensor
from lightning_quant.deploy.graph.qdq import exact_session
from lightning_quant.deploy.hosts import host
from lightning_quant.errors import ConfigurationError, DataError, ExportError
from lightning_quant.report.record import RECORD_NAME, RunRecord
from lightning_quant.utilities.files import atomic_write
from lightning_quant.utilities.images import open_image
from lightning_quant.utilities.parsing import is_finite

log = logging.getLogger(__name__)

TABLE_NAME = "predictions.csv"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_HEADER = ("image", "output", "rank", "class", "name", "score")


@dataclass(frozen=True)
class Normalization:
    """What the pixels of a network that takes floats are brought to: ``(pixel / 255 - mean) / std``.

    Args:
        mean: one number for each channel, or one for all.
        std: likewise.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not is_finite(*self.mean, *self.std) or min(self.std) <= 0:
            raise ConfigurationError(
                f"mean={list(self.mean)} and std={list(self.std)}: expected numbers, those of std above 0."
            )


class Predictor:
    """An exported network that takes images, computed by ONNX Runtime as it is written.

    Args:
        folder: of the bundle, or of the run that exported it.
        normalization: for a network that takes floats.

    Raises:
        ConfigurationError: when it takes no image.
        ExportError: when ``io.json`` or the file it names is missing, damaged, or of another export.
    """

    def __init__(self, folder: Path, normalization: Normalization | None = None) -> None:
        folder = _bundle_of(folder)
        self.contract = Contract.read(folder)
        self.normalization = normalization
        self._values = self.contract.to_dict()
        self._names = [one.name for one in self.contract.outputs]
        _check_input(self.contract.inputs, normalization, folder / CONTRACT_NAME)
        self._session = _session(folder / self.contract.file, self.contract)

    def predict(self, photo: Image.Image) -> host.Arrays:
        """Return the outputs for a photograph, by name."""
        (tensor,) = self._values["inputs"]
        if self.normalization is None:
            given = host.pixels(photo, tensor)
        else:
            given = host.normalized(photo, tensor, self.normalization.mean, self.normalization.std)
        try:
            return dict(zip(self._names, self._session.run(self._names, {tensor["name"]: given}), strict=True))
        except Exception as error:  # the library raises classes of its own, one for each status code
            raise ExportError(
                f"ONNX Runtime cannot run {self.contract.file}: {type(error).__name__}: {error} Export it again."
            ) from error

    def write(self, path: Path, stem: Path) -> tuple[str, list[tuple[Any, ...]]]:
        """Predict for an image file and write what is found.

        Args:
            path: of the image.
            stem: path of the files to write, without an ending.

        Returns:
            What was found, in words, and the rows of a table: output, rank, class, name of the class and score.

        Raises:
            DataError: when the file cannot be read as an image.
        """
        image = open_image(path)
        try:
            photo = host.upright(image)
        except ValueError as error:
            raise DataError(f"{path} cannot be taken: {error}. Convert it to a PNG or JPEG file.") from error
        outputs = self.predict(photo)
        found, _ = host.answers(self._values, outputs)
        rows = [
            (answer.name, rank, index, host.class_name(self._values, index), "" if score is None else score)
            for answer in found
            for rank, (index, score) in enumerate(answer.ranking, start=1)
        ]
        return "; ".join(host.write_answers(self._values, outputs, photo, stem)), rows


def _check_input(tensors: Sequence[IoTensor], normalization: Normalization | None, path: Path) -> None:
    """Refuse what is no photograph, and numbers to normalize by where there are none to be or some are missing."""
    if len(tensors) > 1:
        raise ConfigurationError(
            f"{path} names {len(tensors)} inputs, {', '.join(repr(one.name) for one in tensors)}: expected one image. "
            "Give host/host.py in the bundle an .npz file with all of them."
        )
    (tensor,) = tensors
    what = f"{path} says that {tensor.name!r} takes {tensor.type} of shape {list(tensor.shape)}"
    if tensor.holds == "image":
        if normalization is not None:
            raise ConfigurationError(f"{what}, pixels that the device normalizes: leave out --mean and --std.")
        return
    channels = tensor.shape[1] if len(tensor.shape) == 4 else 0
    if tensor.type != "float32" or channels not in host.MODES:
        raise ConfigurationError(
            f"{what}: expected an image, float32 of shape [1, channels, height, width]. Give host/host.py in the "
            "bundle an .npy file."
        )
    if normalization is None:
        raise ConfigurationError(
            f"{what}, and no pixels: expected the mean and std that its data was normalized with. Give --mean and "
            "--std, as --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225, or export with DeviceExport(inputs="
            "{'mean': …, 'std': …}), after which it takes pixels."
        )
    for numbers in (normalization.mean, normalization.std):
        if len(numbers) not in (1, channels):
            raise ConfigurationError(
                f"{list(numbers)} for {tensor.name!r} of {channels} channels: expected one number, or one for each."
            )


def _bundle_of(folder: Path) -> Path:
    if (folder / CONTRACT_NAME).is_file() or not (folder / RECORD_NAME).is_file():
        return folder
    place = RunRecord.read(folder / RECORD_NAME).artifacts.get("bundle")
    if place is None:
        raise ConfigurationError(f"The run {folder} has no bundle: expected a run that exported a network.")
    return folder / place


def _session(path: Path, contract: Contract) -> Any:
    """Open the file, and refuse one that io.json does not speak of."""
    if not path.is_file():
        raise ExportError(f"There is no {path}, of which {CONTRACT_NAME} speaks. Export the bundle again.")
    try:
        session = exact_session(path)
    except Exception as error:  # the library raises classes of its own, one for each status code
        raise ExportError(f"ONNX Runtime refuses {path}: {type(error).__name__}: {error} Export it again.") from error
    for given, tensors in ((session.get_inputs(), contract.inputs), (session.get_outputs(), contract.outputs)):
        there = [(one.name, list(one.shape), _element_type(one.type)) for one in given]
        said = [(one.name, list(one.shape), one.type) for one in tensors]
        if there != said:
            raise ExportError(
                f"{path} has {there}, but {CONTRACT_NAME} beside it says {said}: expected files of one export. Export "
                "the bundle again."
            )
    return session


def _element_type(given: str) -> str:
    """``tensor(float)`` as ``io.json`` has it."""
    name = given.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)


def command(arguments: Sequence[str]) -> int:
    """Print a line for each image, with what the network sees in it.

    Args:
        arguments: of the command line, behind ``predict``.

    Returns:
        The exit status: 0 if every image was read.

    Raises:
        LightningQuantError: when nothing can be predicted.
    """
    given = _parser().parse_args(arguments)
    if (given.mean is None) != (given.std is None):
        raise ConfigurationError("--mean and --std belong together: expected both or none.")
    normalization = None if given.mean is None else Normalization(given.mean, given.std)
    images = list(_images(given.images))
    if not images:
        raise DataError(
            f"No image files in {', '.join(map(str, given.images))}: expected some of {', '.join(_SUFFIXES)}."
        )
    predictor = Predictor(given.bundle, normalization)
    try:
        return 0 if _predict_all(predictor, images, given.out) else 1
    except OSError as error:
        raise ConfigurationError(f"{given.out} cannot be written: {error}. Give another folder with --out.") from error


def _predict_all(predictor: Predictor, images: Sequence[Path], out: Path) -> bool:
    """Predict one by one; a file that cannot be read costs none of the others."""
    out.mkdir(parents=True, exist_ok=True)
    table: list[tuple[Any, ...]] = []
    whole = True
    for path, name in host.free_names(images).items():
        try:
            said, rows = predictor.write(path, out / name)
        except DataError as error:
            log.error("%s", error)
            whole = False
            continue
        table += [(path, *row) for row in rows]
        print(f"{path}: {said}")
    if table:
        with atomic_write(out / TABLE_NAME) as partial, partial.open("w", newline="") as file:
            csv.writer(file).writerows([_HEADER, *table])
        print(out / TABLE_NAME)
    return whole


def _images(places: Sequence[Path]) -> Iterator[Path]:
    for place in places:
        if place.is_dir():
            yield from sorted(path for path in place.rglob("*") if path.suffix.lower() in _SUFFIXES)
        else:
            yield place


def _parser() -> argparse.ArgumentParser:
    def numbers(text: str) -> tuple[float, ...]:
        return tuple(float(one) for one in text.split(","))

    parser = argparse.ArgumentParser("lightning-quant predict", description=__doc__)
    parser.add_argument("bundle", type=Path, help="folder of a bundle, or of the run that exported it")
    parser.add_argument("images", type=Path, nargs="+", help="image files, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder for what is found")
    parser.add_argument("--mean", type=numbers, help="of pixels in 0…1, for a network of floats: 0.485,0.456,0.406")
    parser.add_argument("--std", type=numbers, help="likewise")
    return parser
