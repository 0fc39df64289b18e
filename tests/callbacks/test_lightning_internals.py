"""Lightning's private names are used in one file, and that file uses them as Lightning has them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import lightning.pytorch
import pytest
import torch
from torch import nn

import lightning_quant
from lightning_quant.callbacks import lightning_internals

PACKAGE = Path(lightning_quant.__file__).parent
DOOR = Path(lightning_internals.__file__)
# The only parts of the package that Lightning's objects come to, see docs/inside.md.
PARTS = ("callbacks", "cli", "domains")
# PyTorch's modules and tensors have these too, and are asked for them.
OF_PYTORCH = frozenset(dir(nn.Module())) | frozenset(dir(torch.Tensor)) | {"_LRScheduler"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


@cache
def names_of_lightning() -> frozenset[str]:
    """The private names that Lightning defines: functions, classes, attributes and variables."""
    found = set()
    for part in ("pytorch", "fabric"):
        for path in Path(lightning.__file__).parent.joinpath(part).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    found.add(node.name)
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    found.add(node.attr)
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    found.add(node.id)
    return frozenset(filter(is_private, found)) - OF_PYTORCH


def uses(source: str) -> Iterator[str]:
    """Where code uses a private name of Lightning's: imported, as an attribute of what is not its own, or as text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("lightning.", "pytorch_lightning")):
            yield from (f"{node.lineno}: import {one.name}" for one in node.names if is_private(one.name))
        elif isinstance(node, ast.Attribute) and node.attr in names_of_lightning():
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield f"{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Constant) and node.value in names_of_lightning():
            yield f"{node.lineno}: {node.value!r}"


def test_private_names_of_lightning_are_used_in_one_file() -> None:
    files = [path for part in PARTS for path in (PACKAGE / part).rglob("*.py") if path != DOOR]
    assert len(files) > 30
    assert [f"{path.relative_to(PACKAGE)}:{use}" for path in files for use in uses(path.read_text())] == []


def test_only_these_parts_of_the_package_know_lightning() -> None:
    others = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in PARTS]
    for path in others:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imported = [one.name for node in nodes if isinstance(node, ast.Import) for one in node.names]
        imported += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        assert not [name for name in imported if name.split(".")[0] in ("lightning", "pytorch_lightning")], path


@pytest.mark.parametrize(
    "line",
    [
        "from lightning.pytorch.utilities.data import _is_dataloader_shuffled",
        "trainer._data_connector",
        "trainer.fit_loop._data_source.dataloader()",
        "getattr(trainer.strategy, '_layer_sync', None)",
        "pl_module._trainer = trainer",
        "callback._average_model",
    ],
)
def test_the_count_sees(line: str) -> None:
    assert list(uses(line))


@pytest.mark.parametrize("line", ["self._data_source", "module._modules", "optimizer.param_groups", "path._flavour"])
def test_the_count_leaves_alone(line: str) -> None:
    assert not list(uses(line))


def test_what_lightning_keeps_in_a_module_is_known() -> None:
    for package in (lightning.pytorch, pytest.importorskip("pytorch_lightning")):
        module = package.LightningModule()
        own = frozenset(vars(module))
        module.best = 1.0
        assert own - frozenset(vars(nn.Module())) == lightning_internals.attributes_of_lightning(module)
    assert lightning_internals.attributes_of_lightning(nn.Linear(1, 1)) == frozenset()


def test_the_one_file_uses_them() -> None:
    assert len(list(uses(DOOR.read_text()))) > 10
