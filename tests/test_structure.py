"""The package's files: one door to AIMET, none to the worked domains, no circles, none over 400 lines."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from lightning_quant.simulation import aimet

PACKAGE = Path(__file__).resolve().parent.parent / "lightning_quant"
DOOR = PACKAGE / "simulation/aimet.py"
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
MOST_LINES = 400


def _imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or late, and every name from one: it may be a module too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_only_the_door_imports_aimet() -> None:
    importing = {path for path in FILES.values() for name in _imported(path) if name.startswith("aimet")}
    assert importing == {DOOR}


def test_nothing_but_a_configuration_leads_to_the_worked_domains() -> None:
    importing = {
        name
        for name, path in FILES.items()
        for one in _imported(path)
        if one.startswith("lightning_quant.domains") and not name.startswith("lightning_quant.domains")
    }
    assert not importing


def test_every_name_in_the_door_exists_and_is_used() -> None:
    source = "\n".join(path.read_text() for path in FILES.values() if path != DOOR)
    for name in aimet._HOMES:
        assert getattr(aimet, name) is not None
        assert name in source, f"{name} is used nowhere: remove it from the door"


def test_no_two_files_import_each_other() -> None:
    imported = {name: {one for one in _imported(path) if one in FILES} for name, path in FILES.items()}
    pairs = {
        frozenset({name.removeprefix("lightning_quant."), other.removeprefix("lightning_quant.")})
        for name, others in imported.items()
        for other in others - {name, "lightning_quant"}
        if name in imported[other]
    }
    assert not pairs


def test_no_file_is_longer_than_400_lines() -> None:
    sources = [path for kind in ("*.py", "*.cpp", "*.h") for path in PACKAGE.rglob(kind)]
    assert [path.name for path in sources if len(path.read_text().splitlines()) > MOST_LINES] == []
