"""What can be compared: a bundle, a run's folder, or a baseline that was kept of one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_quant.deploy.bundle import MANIFEST_NAME, Bundle, load_bundle
from lightning_quant.deploy.compare.bounds import DEFAULTS, Bounds, parse_bounds, read_bounds
from lightning_quant.deploy.compare.judging import compare_sides
from lightning_quant.deploy.compare.reading import Side, read_bundle
from lightning_quant.deploy.compare.result import Changes
from lightning_quant.deploy.compare.snapshot import RunFigures, Snapshot
from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.deploy.push import REQUEST_NAME, device_folder
from lightning_quant.deploy.request import Request
from lightning_quant.deploy.targets.target import REPORT_NAME
from lightning_quant.errors import ConfigurationError, DataError
from lightning_quant.report.record import RECORD_NAME, RunRecord
from lightning_quant.utilities.parsing import parse_as, read_json


def compare(old: str | Path, new: str | Path, *, bounds: str | Path | Mapping[str, object] | None = None) -> Changes:
    """Compare an export with an earlier one of the same network, and judge what became worse.

    Examples:
        >>> found = lq.compare("baseline.json", "export/net", bounds={"metric": "-0.5 pt"})  # doctest: +SKIP
        >>> print(found)  # doctest: +SKIP

    Args:
        old: folder of a bundle or of a run, or a baseline that :func:`write_baseline` wrote.
        new: likewise.
        bounds: how much worse each thing may become: a YAML file or names with bounds. Default:
            :data:`~lightning_quant.deploy.compare.bounds.DEFAULTS`.

    Raises:
        ConfigurationError: for an unknown bound, or when the two are different networks.
        ExportError: when a bundle is damaged.
        DataError: when a baseline, a record or a report of a device is.
    """
    judged = _bounds(bounds)
    return compare_sides(open_side(old), open_side(new), judged)


def write_baseline(path: str | Path, side: str | Path) -> Path:
    """Keep what is compared of a bundle or a run as a small JSON file.

    Args:
        path: the file to write.
        side: folder of a bundle or of a run.

    Raises:
        ConfigurationError, ExportError, DataError: see :func:`compare`.
    """
    return open_side(side).snapshot.write(path)


def _bounds(given: str | Path | Mapping[str, object] | None) -> Bounds:
    if given is None:
        return DEFAULTS
    return parse_bounds(given) if isinstance(given, Mapping) else read_bounds(given)


def open_side(path: str | Path) -> Side:
    """Read what is compared of a bundle's folder, a run's folder or a baseline.

    Raises:
        ConfigurationError: when it is none of them, or a folder with several bundles.
        ExportError, DataError: when it is damaged.
    """
    path = Path(path).absolute()
    if path.is_file():
        return Side(Snapshot.read(path))
    if (path / MANIFEST_NAME).is_file():
        return _of_bundle(load_bundle(path), _record_of(path))
    if (path / RECORD_NAME).is_file():
        record = RunRecord.read(path / RECORD_NAME)
        if "bundle" not in record.artifacts:
            raise ConfigurationError(f"The run {path} exported nothing ({record.status}): expected one with a bundle.")
        return _of_bundle(load_bundle(path / record.artifacts["bundle"]), record)
    bundles = sorted(one.parent for one in path.glob(f"*/{MANIFEST_NAME}") if one.parent.suffix != ".failed")
    if len(bundles) == 1:
        return _of_bundle(load_bundle(bundles[0]), _record_of(bundles[0]))
    found = f"has {len(bundles)} bundles: {', '.join(one.name for one in bundles)}"
    if not bundles:
        found = "has nothing to compare" if path.exists() else "does not exist"
    raise ConfigurationError(
        f"{path} {found}. Expected a baseline, or the folder of one bundle or of one run of lightning-quant."
    )


def _record_of(bundle: Path) -> RunRecord | None:
    """Return the record of the run that a bundle is of, written by ``DeviceExport`` or by the app, if there is one."""
    beside, above = bundle.with_name(f"{bundle.name}.report") / RECORD_NAME, bundle.parent.parent / RECORD_NAME
    if beside.is_file():
        return RunRecord.read(beside)
    try:  # of that name may be a file of somebody else's
        artifacts = parse_as(read_json(above), dict[str, Any]).get("artifacts")
        place = parse_as(artifacts, dict[str, str]).get("bundle", "none")
    except (OSError, ValueError):
        return None
    return RunRecord.read(above) if (above.parent / place).resolve() == bundle.resolve() else None


def _of_bundle(bundle: Bundle, record: RunRecord | None) -> Side:
    if record is None:
        return read_bundle(bundle, RunFigures(), _reports(bundle))
    manifest = bundle.manifest
    same = record.export in ("", manifest.files_sha256)
    if not same or (record.bytes, record.parity) != (manifest.bytes, manifest.parity):
        raise DataError(
            f"The {RECORD_NAME} of {bundle.path} is of another export: expected that of its files. Run again, or "
            "remove it to compare the bundle alone."
        )
    return read_bundle(bundle, _run(record), record.device)


def _run(record: RunRecord) -> RunFigures:
    exported = record.exported or ""
    metric = {"float": record.metric.get("float"), "simulation": record.metric.get(exported)}
    return RunFigures(
        monitor=record.monitor,
        mode=record.mode,
        metric={name: value for name, value in metric.items() if value is not None and math.isfinite(value)},
        classes=record.class_figures.get(exported, {}),
        rung=exported,
        config_hash=record.config_hash,
    )


def _reports(bundle: Bundle) -> list[DeviceReport]:
    """Return the reports next to a bundle without a record.

    Raises:
        DataError: when they are damaged, or of an earlier export.
    """
    folder = device_folder(bundle)
    paths = sorted(folder.rglob(REPORT_NAME))
    if not paths:
        return []
    try:
        request = Request.read(folder / REQUEST_NAME)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / REQUEST_NAME} cannot be read: {error}. Run or export again.") from error
    if request.bundle != bundle.manifest.files:
        raise DataError(f"{folder} is of an earlier export of {bundle.path}. Send it again, or remove that folder.")
    return [DeviceReport.read(path) for path in paths]
