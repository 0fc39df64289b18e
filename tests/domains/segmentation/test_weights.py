"""Reading weights: every form that is accepted, and what is said about every one that is not."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.domains.segmentation.ffnet import ffnet_nano
from lightning_quant.domains.segmentation.weights import load_weights
from lightning_quant.errors import CheckpointError


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("prefix", ["", "model.", "network."])
@pytest.mark.parametrize("nested", [False, True])
def test_loads_plain_nested_and_prefixed_state_dicts(tmp_path: Path, prefix: str, nested: bool) -> None:
    state = ffnet_nano().state_dict()
    content: dict[str, object] = {prefix + key: value for key, value in state.items()}
    if prefix:
        # Neighbors of the network in its LightningModule.
        content |= {"criterion.weight": torch.ones(19), "metric._extra_state": {"seen": 3}}
    torch.save({"state_dict": content, "epoch": 3} if nested else content, tmp_path / "weights.pt")
    assert same(ffnet_nano(weights=tmp_path / "weights.pt").state_dict(), state)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"No weights at '.*none\.pt': expected a file written by torch"):
        ffnet_nano(weights=tmp_path / "none.pt")


def test_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    torch.save(ffnet_nano().state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"cut\.pt' cannot be read as weights"):
        ffnet_nano(weights=path)


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><p>Not found</p>", b"\x80\x02."])
def test_file_of_another_kind(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "page.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"page\.pt' cannot be read as weights"):
        ffnet_nano(weights=tmp_path / "page.pt")


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": Trap(tmp_path / "ran")}}, tmp_path / "trap.pt")
    with pytest.raises(CheckpointError, match="holds tensors and plain values only"):
        ffnet_nano(weights=tmp_path / "trap.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": 3}, {"epoch": 3}, {}])
def test_no_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt' holds no state dict"):
        ffnet_nano(weights=tmp_path / "other.pt")


def test_other_number_of_classes(tmp_path: Path) -> None:
    torch.save(ffnet_nano(num_classes=11).state_dict(), tmp_path / "eleven.pt")
    with pytest.raises(CheckpointError, match=r"2 shape: .*last_layer.3.bias \(11,\) instead of \(19,\)"):
        ffnet_nano(weights=tmp_path / "eleven.pt")


def test_other_network(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    with pytest.raises(CheckpointError, match=r"\d+ missing: backbone_model.* 2 unexpected: weight, bias\."):
        load_weights(ffnet_nano(), tmp_path / "linear.pt")


def test_quantized_checkpoint_names_its_loader(tmp_path: Path) -> None:
    state = {f"model.{key}": value for key, value in ffnet_nano().state_dict().items()}
    state["model.backbone_model.conv0.param_quantizers.weight.min"] = torch.zeros(16)
    torch.save({"state_dict": state}, tmp_path / "quantized.ckpt")
    with pytest.raises(CheckpointError, match="quantized checkpoint: load it with"):
        ffnet_nano(weights=tmp_path / "quantized.ckpt")
