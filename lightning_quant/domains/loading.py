"""What the data modules of all domains have in common: loaders, ranges of arguments, folders that are drawn into."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_quant.errors import ConfigurationError, DataError
from lightning_quant.utilities.files import atomic_write
from lightning_quant.utilities.parsing import read_json


def check_least(**bounds: tuple[int, int]) -> None:
    """Refuse arguments below their least value.

    Args:
        **bounds: value and least value of each argument.

    Raises:
        ConfigurationError: naming the first that is too small.
    """
    for name, (value, least) in bounds.items():
        if value < least:
            raise ConfigurationError(f"{name}={value}: expected at least {least}.")


def loader(dataset: Dataset[Any], batch_size: int, num_workers: int = 0, **options: Any) -> DataLoader[Any]:
    """Return a loader whose workers stay from epoch to epoch, into pinned memory where there is a GPU.

    Args:
        dataset: what it loads.
        batch_size: items in a batch.
        num_workers: processes that load; 0 loads in the main process.
        **options: other arguments of PyTorch's ``DataLoader``.
    """
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        **options,
    )


def training_loader(dataset: Dataset[Any], batch_size: int, num_workers: int = 0, **options: Any) -> DataLoader[Any]:
    """Return a :func:`loader` of shuffled batches of equal size; the incomplete last one is dropped.

    Raises:
        ConfigurationError: when ``batch_size`` is larger than the data set, so that no batch would be left.
    """
    assert isinstance(dataset, Sized)
    if len(dataset) < batch_size:
        raise ConfigurationError(
            f"batch_size={batch_size} with a training split of {len(dataset)} images: "
            f"not one full batch. Pass batch_size={len(dataset)} or less."
        )
    return loader(dataset, batch_size, num_workers, shuffle=True, drop_last=True, **options)


def claim_folder(root: Path, name: str, parameters: Mapping[str, Any]) -> None:
    """Record in an empty folder what is drawn into it, or make sure that it is what is recorded there.

    Args:
        root: the folder, created if missing.
        name: of the file that holds the parameters, such as ``"scenes.json"``.
        parameters: of the generator.

    Raises:
        DataError: when the folder holds something else.
    """
    manifest = root / name
    if not manifest.is_file():
        if root.is_dir() and any(not p.name.startswith(".") for p in root.iterdir()):
            raise DataError(f"{root} holds files but no {name}: this generator did not make it. Pass an empty folder.")
        with atomic_write(manifest) as partial:
            partial.write_text(json.dumps(parameters, indent=2) + "\n")
        return
    try:
        recorded = read_json(manifest)
    except (OSError, ValueError) as error:
        raise DataError(f"{manifest} cannot be read ({error}). Delete {root} to draw the images again.") from error
    if recorded != parameters:
        raise DataError(
            f"{root} holds images drawn with {recorded}, but {parameters} is asked for. "
            "Pass another folder, or delete this one to draw the images again."
        )
