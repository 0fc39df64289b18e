"""Two processes: every rank holds the same network, calibrated on the samples of both."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import TensorDataset

from lightning_quant import PostTrainingQuantization, load_quantized
from tests.helpers.processes import environment, run_two_ranks
from tests.helpers.small import SmallModule, assert_same_tensors, encodings, small_data, small_loader, small_net
from tests.helpers.trainers import quiet_trainer

pytestmark = pytest.mark.slow

# A user's script, started once: Lightning launches the second process.
SCRIPT = """
import os, sys
import torch
from torch.utils.data import TensorDataset
from lightning_quant import DeviceExport, PostTrainingQuantization, QuantizationAwareTraining
from tests.callbacks.test_ddp import lopsided
from tests.helpers.small import SmallModule, encodings, small_loader
from tests.helpers.trainers import quiet_trainer

stage, estimator, out = sys.argv[1:]
torch.set_num_threads(1)
two = dict(devices=2, strategy="ddp", max_epochs=2)
torch.manual_seed(int(os.environ.get("LOCAL_RANK", 0)))  # the ranks' own random numbers differ
module = SmallModule()
module.model.stem.requires_grad_(False)  # DDP refuses parameters without gradients, those of its ranges too
loader = small_loader(lopsided(), batch_size=4)
before = {}
if stage == "qat":
    class Qat(QuantizationAwareTraining):
        def on_train_start(self, trainer, pl_module):
            before.update(encodings(pl_module.quantized))
    callbacks = [Qat(range_estimator=estimator), DeviceExport(name="net", samples=2)]
    trainer = quiet_trainer(out, *callbacks, **two)
    trainer.fit(module, loader, loader)
else:
    callback = PostTrainingQuantization(range_estimator=estimator, calibration_dataloader=loader)
    trainer = quiet_trainer(out, callback, **two)
    trainer.validate(module, loader, verbose=False)
    before.update(encodings(module.quantized))
torch.save({"state": module.state_dict(), "calibrated": before, "batches": len(module.called)},
           f"{out}/rank{trainer.global_rank}.pt")
trainer.save_checkpoint(f"{out}/last.ckpt")
"""


def lopsided() -> TensorDataset:
    """Every second sample, which is every sample of the second rank, is five times as large."""
    images, labels = small_data(16).tensors
    images = images.clone()
    images[1::2] *= 5
    return TensorDataset(images, labels)


def run(tmp_path: Path, stage: str, estimator: str) -> list[dict[str, Any]]:
    return run_two_ranks(tmp_path, SCRIPT, stage, estimator, str(tmp_path))


@pytest.mark.parametrize(
    ("stage", "estimator"), [("qat", "min_max"), pytest.param("ptq", "tf_enhanced", marks=pytest.mark.torture)]
)
def test_both_ranks_hold_the_network_calibrated_on_all_samples(tmp_path: Path, stage: str, estimator: str) -> None:
    ranks = run(tmp_path, stage, estimator)
    assert_same_tensors(ranks[0]["state"], ranks[1]["state"])
    assert_same_tensors(ranks[0]["calibrated"], ranks[1]["calibrated"])
    # each saw its half: sanity check or not, 2 of 4 batches an epoch
    assert ranks[0]["batches"] == {"qat": 2 + 2 * (2 + 2), "ptq": 2}[stage]
    found: dict[str, torch.Tensor] = ranks[0]["calibrated"]
    if estimator == "min_max":
        largest = float(lopsided().tensors[0].abs().max())
        assert float(found["stem.input_quantizers.0.max"]) == pytest.approx(largest, rel=0.2)
    # one process that sees the same samples in the same batches: first rank's batch, second rank's batch, …
    images, labels = lopsided().tensors
    order = [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    module = SmallModule()
    callback = PostTrainingQuantization(
        range_estimator=estimator,
        calibration_dataloader=small_loader(TensorDataset(images[order], labels[order]), batch_size=4),
    )
    quiet_trainer(tmp_path, callback).validate(module, small_loader(), verbose=False)
    assert_same_tensors(found, encodings(module.quantized))
    # what the ranks saved together is an ordinary checkpoint, and rank 0 alone exported
    loaded = load_quantized(SmallModule, tmp_path / "last.ckpt")
    assert_same_tensors(loaded.state_dict(), ranks[0]["state"])
    assert (tmp_path / "export/net" / "manifest.json").is_file() == (stage == "qat")


EXCHANGE = """
import sys
import torch
from lightning.pytorch import Callback
from torch.nn.utils.rnn import pack_sequence
from lightning_quant.callbacks.calibration import _of_all_ranks
from lightning_quant.simulation.inputs import NetworkInputs
from tests.helpers.small import SmallModule, small_loader
from tests.helpers.trainers import quiet_trainer

def calls(rank):
    some = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5) + 1000 * rank
    first = NetworkInputs(
        (some.float().contiguous(memory_format=torch.channels_last), "text"),
        {"flags": some > 30, "nested": {"small": some.to(torch.int16), "complex": some * 1j}, "none": None},
    )
    sequences = pack_sequence([some[0].float(), some[1, :2].float()], enforce_sorted=False)
    second = NetworkInputs((sequences, some[..., ::2].float(), torch.empty(0, 3)), last=False)
    return [first, second] if rank else [first]

class Exchange(Callback):
    def on_fit_start(self, trainer, pl_module):
        found = _of_all_ranks(trainer, calls(trainer.global_rank))
        wanted = [call for rank in range(2) for call in calls(rank)]
        assert [repr(one) for one in found] == [repr(one) for one in wanted]
        for one, other in zip(found, wanted, strict=True):
            for tensor, expected in zip(one.tensors, other.tensors, strict=True):
                assert torch.equal(tensor, expected) and tensor.dtype == expected.dtype
        assert found[1].tensors[0].is_contiguous(memory_format=torch.channels_last)
        assert found[2].args[0].data.shape == (5, 4, 5) and not found[2].last
        assert _of_all_ranks(trainer, []) == []
        torch.save(trainer.global_rank, f"{sys.argv[1]}/rank{trainer.global_rank}.pt")

quiet_trainer(sys.argv[1], Exchange(), devices=2, strategy="ddp", max_epochs=1).fit(SmallModule(), small_loader())
"""


def test_calls_of_any_structure_are_exchanged_between_ranks(tmp_path: Path) -> None:
    assert run_two_ranks(tmp_path, EXCHANGE, str(tmp_path)) == [0, 1]


def test_two_nodes_started_by_torchrun(tmp_path: Path) -> None:
    """One process for each of two nodes, as a cluster starts them; both nodes are this machine."""
    (tmp_path / "train.py").write_text(SCRIPT.replace("devices=2", "devices=1, num_nodes=2"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    arguments = [str(tmp_path / "train.py"), "qat", "min_max", str(tmp_path)]
    with ExitStack() as running:
        nodes = [
            running.enter_context(
                subprocess.Popen(
                    [*command, f"--node-rank={rank}", *arguments], env=environment(), stderr=subprocess.PIPE, text=True
                )
            )
            for rank in range(2)
        ]
        errors = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors[0][-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same_tensors(ranks[0]["state"], ranks[1]["state"])
    assert_same_tensors(ranks[0]["calibrated"], ranks[1]["calibrated"])
    assert ranks[0]["batches"] == 2 + 2 * (2 + 2)  # each saw its half
    largest = float(lopsided().tensors[0].abs().max())  # which the second node alone has
    assert float(ranks[0]["calibrated"]["stem.input_quantizers.0.max"]) == pytest.approx(largest, rel=0.2)
    assert (tmp_path / "export/net/manifest.json").is_file()


LADDER = """
import os, sys, copy
import torch
from lightning_quant import QuantizationAwareTraining
from tests.helpers.small import SmallModule, SmallNet, small_data, small_loader, small_net
from tests.helpers.trainers import quiet_trainer

out = sys.argv[1]
torch.set_num_threads(1)
rank = int(os.environ.get("LOCAL_RANK", 0))

class Decodes(SmallNet):  # what only eval mode comes to gets no gradients, which DDP does not take
    def forward(self, x):
        scores = super().forward(x)
        return scores if self.training else scores.sigmoid() * 4.0 - 2.0

class Module(SmallModule):
    def validation_step(self, batch, batch_idx):
        loss = self._loss(batch)
        # not synchronized, and alone the second rank would be content with anything
        self.log("own_loss", loss * (1 if rank == 0 else 0) + rank)

found = {}
for max_drop in (-10.0, 5.0):
    callback = QuantizationAwareTraining("w4a8", monitor="own_loss", mode="min", max_drop=max_drop,
                                         rungs=("ptq", "bias_correction", "seq_mse"))
    trainer = quiet_trainer(f"{out}/{max_drop}", callback, devices=2, strategy="ddp", max_epochs=1)
    module = Module(small_net())
    module.model.__class__ = Decodes
    trainer.fit(module, small_loader(), small_loader())
    found[max_drop] = {"state": module.state_dict(), "result": callback.result.to_dict(), "steps": trainer.global_step}
torch.save(found, f"{out}/rank{rank}.pt")
"""


@pytest.fixture(scope="module")
def ladders(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What became of both ladders, by ``max_drop``, on either rank: the two processes are started once."""
    folder = tmp_path_factory.mktemp("ladders")
    return run_two_ranks(folder, LADDER, str(folder))


@pytest.mark.parametrize(("max_drop", "trained"), [(-10.0, True), (5.0, False)])
def test_the_ladder_decides_the_same_on_both_ranks(
    ladders: list[dict[str, Any]], max_drop: float, trained: bool
) -> None:
    one, two = (rank[max_drop] for rank in ladders)
    assert_same_tensors(one["state"], two["state"])
    for result in (one["result"], two["result"]):
        for rung in result["rungs"]:
            del rung["seconds"], rung["peak_memory_bytes"]
    assert one["result"] == two["result"]
    assert one["steps"] == two["steps"] == (2 if trained else 0)
    names = [rung["rung"] for rung in one["result"]["rungs"]]
    assert names == (["ptq", "bias_correction", "seq_mse", "qat"] if trained else ["ptq"])


SYNCHRONIZED = """
import os, sys
import torch
from torch import nn
from lightning_quant import QuantizationAwareTraining
from lightning_quant.errors import ConfigurationError
from tests.helpers.small import SmallModule, small_loader, small_net
from tests.helpers.trainers import quiet_trainer

class Kept(nn.Module):  # nothing before the batch norm that it could be folded into
    def __init__(self, norm):
        super().__init__()
        self.norm, self.rest = norm, small_net()

    def forward(self, x):
        return self.rest(self.norm(x))

out = sys.argv[1]
torch.set_num_threads(1)
rank = int(os.environ.get("LOCAL_RANK", 0))
found = {}
for kind in ("folded", "kept"):
    module = SmallModule(small_net() if kind == "folded" else Kept(nn.BatchNorm2d(3)))
    callback = QuantizationAwareTraining("w8a8")
    trainer = quiet_trainer(f"{out}/{kind}", callback, devices=2, strategy="ddp", sync_batchnorm=True, max_epochs=1)
    error = ""
    try:
        trainer.fit(module, small_loader(), small_loader())
    except ConfigurationError as refused:
        error = str(refused)
    norms = [one for one in module.model.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    classes = [type(norm).__name__ for norm in norms]
    found[kind] = {"error": error, "classes": classes, "steps": trainer.global_step}
torch.save(found, f"{out}/rank{rank}.pt")
"""


@pytest.fixture(scope="module")
def synchronized(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What became of both networks on either rank: the two processes are started once."""
    folder = tmp_path_factory.mktemp("synchronized")
    return run_two_ranks(folder, SYNCHRONIZED, str(folder))


@pytest.mark.parametrize("kind", ["folded", "kept"])
def test_synchronized_batch_norms_do_not_lose_their_quantizers(synchronized: list[dict[str, Any]], kind: str) -> None:
    one, two = (rank[kind] for rank in synchronized)
    assert one == two
    if kind == "folded":  # nothing is left to synchronize
        assert (one["error"], one["classes"], one["steps"]) == ("", [], 2)
    else:
        assert "sync_batchnorm=True" in str(one["error"])
        assert "'norm'" in str(one["error"])
        assert "nn.SyncBatchNorm in its __init__" in str(one["error"])
        assert one["classes"] == ["QuantizedBatchNorm2d"]


def test_batch_norms_that_synchronize_by_themselves_are_quantized(trainer: Callable[..., Trainer]) -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.rest = nn.SyncBatchNorm(3), small_net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rest(self.norm(x))

    module = SmallModule(Kept())
    callback = PostTrainingQuantization(calibration_dataloader=small_loader())
    trainer(callback).validate(module, small_loader(), verbose=False)
    norm: Any = module.model.norm
    assert isinstance(norm, nn.SyncBatchNorm)
    assert norm.output_quantizers[0].is_initialized()
