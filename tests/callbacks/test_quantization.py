"""Where the quantized network goes in, when it is calibrated, and what is refused: both quantization callbacks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining
from lightning_quant.errors import CalibrationError, CheckpointError, ConfigurationError, PreflightError
from lightning_quant.simulation.fast.biases import unrounded_biases
from tests.helpers.small import (
    SmallModule,
    SmallNet,
    assert_same_tensors,
    encodings,
    small_data,
    small_loader,
    small_net,
)
from tests.helpers.trainers import quiet_trainer

MakeTrainer = Callable[..., Trainer]
CALLBACKS = [PostTrainingQuantization, QuantizationAwareTraining]


class Watch(pl.Callback):
    """Calls back at hooks, to look at things in their midst."""

    def __init__(self, **hooks: Callable[[Trainer, pl.LightningModule], None]) -> None:
        for name, hook in hooks.items():
            setattr(self, name, lambda trainer, module, *_, hook=hook: hook(trainer, module))


@pytest.fixture(scope="module")
def quantized_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after one epoch of QAT."""
    root = tmp_path_factory.mktemp("quantized")
    trainer = quiet_trainer(root, QuantizationAwareTraining(), max_epochs=1)
    trainer.fit(SmallModule(), small_loader())
    trainer.save_checkpoint(root / "quantized.ckpt")
    return root / "quantized.ckpt"


def stored_ranges(checkpoint: Path) -> dict[str, Tensor]:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    prefix = "model."
    return {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if name.startswith(prefix) and "quantizer" in name and name.endswith((".min", ".max"))
    }


# Where the structure goes in


def test_optimizer_holds_every_weight_and_every_range(trainer: MakeTrainer) -> None:
    module = SmallModule()
    trainer(QuantizationAwareTraining(), max_epochs=1).fit(module, small_loader())
    # folding took the batch norm's weight and bias, and gave the stem a bias
    weights = [name for name, _ in module.named_parameters() if "quantizer" not in name]
    assert len(weights) == 6
    ranges = module.quantized.range_parameters()
    # both ends of: 3 weights; input, stem's ReLU, branch, sum, mean and head outputs
    assert len(ranges) == 2 * (3 + 6)
    held = {id(p) for group in module.trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(parameter) for parameter in module.parameters()}
    assert len(held) == len(weights) + len(ranges)


def test_network_is_in_place_before_the_optimizers_are_made(trainer: MakeTrainer) -> None:
    seen: list[int] = []

    def optimizers(module: SmallModule) -> Any:
        seen.append(len(list(module.parameters())))
        return torch.optim.SGD(module.parameters(), lr=0.1)

    module = SmallModule(optimizers=optimizers)
    trainer(QuantizationAwareTraining(), max_steps=1).fit(module, small_loader())
    # the folded network, its ranges out of sight: they join the optimizer that is made
    assert seen == [len([name for name, _ in module.named_parameters() if "quantizer" not in name])]


def test_attributes_are_reached_through_the_quantized_network(trainer: MakeTrainer) -> None:
    module = SmallModule()
    trainer(PostTrainingQuantization()).fit(module, small_loader())
    assert module.model.stem is module.quantized.network.stem


@pytest.mark.parametrize("callback", CALLBACKS)
def test_second_run_keeps_the_network(trainer: MakeTrainer, callback: Any) -> None:
    module, quantizer = SmallModule(), callback()
    one = trainer(quantizer, max_epochs=1)
    one.fit(module, small_loader(), small_loader())
    network, ranges = module.quantized, encodings(module.quantized)
    one.validate(module, small_loader(), verbose=False)
    trainer(callback()).test(module, small_loader(), verbose=False)
    assert module.quantized is network
    assert_same_tensors(encodings(network), ranges)


# Every stage, in every order


def test_validate_only(trainer: MakeTrainer) -> None:
    module = SmallModule()
    callback = PostTrainingQuantization("w4a8", calibration_dataloader=small_loader())
    (metrics,) = trainer(callback).validate(module, small_loader(), verbose=False)
    quantized = metrics["val_loss"]
    (metrics,) = trainer().validate(SmallModule(), small_loader(), verbose=False)
    assert module.quantized.calibrated
    # the metric is the quantized network's own
    assert quantized != metrics["val_loss"]
    assert quantized == pytest.approx(metrics["val_loss"], rel=0.2)


def test_test_only(trainer: MakeTrainer) -> None:
    module = SmallModule()
    callback = PostTrainingQuantization(calibration_dataloader=small_loader())
    trainer(callback).test(module, small_loader(), verbose=False)
    assert module.quantized.calibrated
    assert module.called == ["test"] * 4


def test_predict_only(trainer: MakeTrainer) -> None:
    module, plain = SmallModule(), SmallModule()
    callback = PostTrainingQuantization(calibration_dataloader=small_loader())
    quantized = torch.cat(trainer(callback).predict(module, small_loader()))
    exact = torch.cat(trainer().predict(plain, small_loader()))
    assert type(quantized) is Tensor
    assert not torch.equal(quantized, exact)
    torch.testing.assert_close(quantized, exact, atol=0.1, rtol=0)


def test_fit_after_validate(trainer: MakeTrainer) -> None:
    module = SmallModule()
    one = trainer(QuantizationAwareTraining(calibration_dataloader=small_loader()), max_epochs=1)
    one.validate(module, small_loader(), verbose=False)
    before = encodings(module.quantized)
    one.fit(module, small_loader(), small_loader())
    after = encodings(module.quantized)
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_fit_after_test_trains_ordinary_tensors(trainer: MakeTrainer) -> None:
    module = SmallModule()
    callback = QuantizationAwareTraining(calibration_dataloader=small_loader())
    trainer(callback).test(module, small_loader(), verbose=False)
    assert not any(tensor.is_inference() for tensor in module.state_dict().values() if isinstance(tensor, Tensor))
    trainer(callback, max_epochs=1).fit(module, small_loader(), small_loader())
    trainer(callback).test(module, small_loader(), verbose=False)
    trainer(callback, max_epochs=1).fit(module, small_loader(), small_loader())
    assert module.called.count("training") == 8


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_quantized_checkpoint_into_fresh_module(trainer: MakeTrainer, quantized_checkpoint: Path, stage: str) -> None:
    module = SmallModule(small_net(seed=5))
    run = getattr(trainer(QuantizationAwareTraining()), stage)
    run(module, small_loader(), ckpt_path=quantized_checkpoint, verbose=False)
    assert_same_tensors(encodings(module.quantized), stored_ranges(quantized_checkpoint))
    state = torch.load(quantized_checkpoint, weights_only=True)["state_dict"]
    assert_same_tensors(module.state_dict(), state)


def test_restored_ranges_are_not_calibrated_again(trainer: MakeTrainer, quantized_checkpoint: Path) -> None:
    module = SmallModule(small_net(seed=5))
    found: dict[str, Tensor] = {}
    watch = Watch(on_train_start=lambda *_: found.update(encodings(module.quantized)))
    others = small_loader(TensorDataset(100 * small_data().tensors[0], small_data().tensors[1]))
    one = trainer(QuantizationAwareTraining(), watch, max_epochs=2)
    one.fit(module, others, ckpt_path=quantized_checkpoint)
    assert_same_tensors(found, stored_ranges(quantized_checkpoint))


def test_calibration_happens_once(trainer: MakeTrainer) -> None:
    module = SmallModule()
    passes: list[int] = []

    class Counting(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            passes.append(index)
            return super().__getitem__(index)

    callback = PostTrainingQuantization(calibration_dataloader=small_loader(Counting(*small_data().tensors)))
    one = trainer(callback)
    one.validate(module, small_loader(), verbose=False)
    one.test(module, small_loader(), verbose=False)
    one.validate(module, small_loader(), verbose=False)
    assert passes == list(range(32))


def test_float_checkpoint_says_how_to_load_it(trainer: MakeTrainer, tmp_path: Path) -> None:
    one = trainer(max_epochs=1)
    one.fit(SmallModule(), small_loader())
    one.save_checkpoint(tmp_path / "float.ckpt")
    module = SmallModule()
    with pytest.raises(CheckpointError, match=r"float weights for 'model'.*(?s:.*)load_from_checkpoint"):
        trainer(QuantizationAwareTraining(), max_epochs=2).fit(
            module, small_loader(), ckpt_path=tmp_path / "float.ckpt"
        )
    assert module.called == []


def test_checkpoint_of_another_precision_is_refused(trainer: MakeTrainer, tmp_path: Path) -> None:
    one = trainer(QuantizationAwareTraining("w4a16"), max_epochs=1)
    one.fit(SmallModule(), small_loader())
    one.save_checkpoint(tmp_path / "w4a16.ckpt")
    module = SmallModule()
    with pytest.raises(CheckpointError, match=r"precision='w4a16'.*given precision='w8a8'"):
        trainer(PostTrainingQuantization("w8a8")).validate(module, small_loader(), ckpt_path=tmp_path / "w4a16.ckpt")
    assert module.called == []


def test_quantized_module_under_a_callback_of_another_precision(trainer: MakeTrainer) -> None:
    module = SmallModule()
    trainer(PostTrainingQuantization("w8a8")).fit(module, small_loader())
    with pytest.raises(ConfigurationError, match=r"already quantized with precision='w8a8'.*precision='w4a8'"):
        trainer(QuantizationAwareTraining("w4a8"), max_epochs=1).fit(module, small_loader())


def test_resume_without_the_callback_fails_in_lightning(trainer: MakeTrainer, quantized_checkpoint: Path) -> None:
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*model\.stem\.param_quantizers"):
        trainer(max_epochs=2).fit(SmallModule(), small_loader(), ckpt_path=quantized_checkpoint)


# Copies


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_compute_the_same_and_are_independent(trainer: MakeTrainer, duplicate: Any) -> None:
    module = SmallModule()
    trainer(PostTrainingQuantization()).fit(module, small_loader())
    network = module.quantized.eval()
    other = duplicate(network)
    images = small_data().tensors[0]
    with torch.no_grad():
        expected = network(images)
        assert torch.equal(other(images), expected)
        assert other.calibrated
        assert other.sim.model.network is other.network
        for parameter in other.parameters():
            parameter.mul_(0.5)
        assert not torch.equal(other(images), expected)
        assert torch.equal(network(images), expected)


def test_callback_can_be_copied_and_used(trainer: MakeTrainer) -> None:
    callback = copy.deepcopy(QuantizationAwareTraining("w4a8", overrides={"head": "w8a16"}))
    module = SmallModule()
    trainer(callback, max_epochs=1).fit(module, small_loader())
    assert str(module.quantized.recipe.precision) == "w4a8"


# Options of the Trainer


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])  # on a CPU Lightning makes the latter the former
def test_mixed_precision(trainer: MakeTrainer, precision: str) -> None:
    module = SmallModule()
    one = trainer(QuantizationAwareTraining(), max_epochs=4, precision=precision)
    one.fit(module, small_loader(), small_loader())
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in module.parameters())
    first = trainer(QuantizationAwareTraining(), max_epochs=4)
    reference = SmallModule()
    first.fit(reference, small_loader(), small_loader())
    assert one.callback_metrics["val_loss"] == pytest.approx(float(first.callback_metrics["val_loss"]), rel=0.05)


def test_accumulation_and_clipping(trainer: MakeTrainer) -> None:
    module = SmallModule()
    norms: list[float] = []

    def measure(_: Trainer, module: pl.LightningModule) -> None:
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        norms.append(float(torch.stack([g.norm() for g in grads]).norm()))

    one = trainer(
        QuantizationAwareTraining(),
        Watch(on_train_batch_end=measure),
        max_epochs=2,
        accumulate_grad_batches=2,
        gradient_clip_val=1e-3,
    )
    one.fit(module, small_loader())
    assert one.global_step == 4
    assert norms[1::2] == pytest.approx([1e-3] * 4, rel=1e-2)  # every second batch takes a step


def test_model_checkpoint_reloads_the_best(trainer: MakeTrainer, tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1)
    stop = EarlyStopping("val_loss", patience=0, mode="max")  # val_loss falls, so this stops after two epochs
    one = trainer(QuantizationAwareTraining(), best, stop, max_epochs=5, enable_checkpointing=True)
    module = SmallModule()
    one.fit(module, small_loader(), small_loader())
    assert one.current_epoch == 2
    (metrics,) = one.validate(dataloaders=small_loader(), ckpt_path="best", verbose=False)
    assert metrics["val_loss"] == float(best.best_model_score)


@pytest.mark.parametrize(
    "averaging",
    [lambda: EMAWeightAveraging(decay=0.5), lambda: StochasticWeightAveraging(1e-3, swa_epoch_start=1)],
    ids=["ema", "swa"],
)
def test_weight_averaging_after_ours(trainer: MakeTrainer, averaging: Any, tmp_path: Path) -> None:
    module = SmallModule()
    losses: list[float] = []
    watch = Watch(on_validation_end=lambda trainer, _: losses.append(float(trainer.callback_metrics["val_loss"])))
    one = trainer(QuantizationAwareTraining(), averaging(), watch, max_epochs=3)
    (float_metrics,) = trainer().validate(SmallModule(), small_loader(), verbose=False)
    one.fit(module, small_loader(), small_loader())
    # the average starts from the calibrated ranges, already for the sanity check
    assert losses[0] == pytest.approx(float_metrics["val_loss"], rel=0.05)
    one.save_checkpoint(tmp_path / "average.ckpt")
    ranges = encodings(module.quantized)
    again = SmallModule()
    trainer(QuantizationAwareTraining()).validate(
        again, small_loader(), ckpt_path=tmp_path / "average.ckpt", verbose=False
    )
    assert_same_tensors(encodings(again.quantized), ranges)


def test_checkpoint_of_an_average_is_calibrated(trainer: MakeTrainer, tmp_path: Path) -> None:
    """Lightning saves the copy that it averages into, which was made before calibration."""
    saver = ModelCheckpoint(tmp_path, filename="average")
    one = trainer(
        QuantizationAwareTraining(), EMAWeightAveraging(decay=0.5), saver, max_epochs=1, enable_checkpointing=True
    )
    one.fit(SmallModule(), small_loader())
    again = SmallModule()
    others = small_loader(TensorDataset(100 * small_data().tensors[0], small_data().tensors[1]))
    trainer(QuantizationAwareTraining(calibration_dataloader=others)).validate(
        again, small_loader(), ckpt_path=tmp_path / "average.ckpt", verbose=False
    )
    assert_same_tensors(encodings(again.quantized), stored_ranges(tmp_path / "average.ckpt"))
    resumed = SmallModule()
    more = trainer(QuantizationAwareTraining(), EMAWeightAveraging(decay=0.5), max_epochs=2)
    more.fit(resumed, small_loader(), ckpt_path=tmp_path / "average.ckpt")
    assert more.global_step == 8


def test_second_quantization_callback_is_refused(trainer: MakeTrainer) -> None:
    module = SmallModule()
    both = (PostTrainingQuantization(), QuantizationAwareTraining())
    with pytest.raises(ConfigurationError, match="PostTrainingQuantization and QuantizationAwareTraining in one"):
        trainer(*both, max_epochs=1).fit(module, small_loader())
    assert type(module.model) is SmallNet


# The user's program stays as it was


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"calibration_samples": 8},  # fewer than there are: the data is not read to its end
        {"calibration_samples": 12, "rungs": ("ptq", "cle", "bias_correction"), "monitor": "val_loss", "mode": "min"},
    ],
    ids=["all samples", "some", "rungs"],
)
def test_order_of_the_data_and_random_numbers_do_not_change(
    trainer: MakeTrainer, options: dict[str, Any], own_generator: bool
) -> None:
    orders, drawn = [], []
    for callbacks in ([], [QuantizationAwareTraining(**options)]):
        pl.seed_everything(3, verbose=False)
        generator = torch.Generator().manual_seed(4) if own_generator else None
        module = SmallModule(optimizers=lambda module: torch.optim.SGD(module.parameters(), lr=0.1))
        data = small_loader(shuffle=True, generator=generator)
        trainer(*callbacks, max_epochs=2).fit(module, data, small_loader())
        orders.append(module.trained_on)
        drawn.append(torch.rand(3).tolist())
    assert len(orders[0]) == 8
    assert orders[0][:4] != orders[0][4:]
    assert orders[1] == orders[0]
    assert drawn[1] == drawn[0]


class Frozen(SmallModule):
    """A teacher in eval mode beside the network, and a dropout in it that the user switched off."""

    def __init__(self) -> None:
        network = nn.Sequential(small_net(), nn.Dropout(0.5), nn.Dropout(0.5))
        super().__init__(network)
        network[2].eval()
        self.teacher = small_net().eval().requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        target = self.teacher(batch[0])
        return (self.model(batch[0]) - target).square().mean()


def test_modules_in_eval_mode_stay_in_eval_mode(trainer: MakeTrainer) -> None:
    module = Frozen()
    teacher = copy.deepcopy(module.teacher.state_dict())
    trainer(QuantizationAwareTraining(), max_epochs=1).fit(module, small_loader(), small_loader())
    assert not any(part.training for part in module.teacher.modules())
    assert_same_tensors(module.teacher.state_dict(), teacher)
    assert module.model.training
    assert module.model.get_submodule("1").training
    assert not module.model.get_submodule("2").training


def test_the_users_network_is_the_one_that_is_quantized_and_a_copy_of_the_float_one_is_kept(
    trainer: MakeTrainer,
) -> None:
    network, module = small_net(), SmallModule(None)
    before, module.model, layers = copy.deepcopy(network.state_dict()), network, list(network.modules())
    trainer(QuantizationAwareTraining(), max_epochs=1).fit(module, small_loader())
    assert module.model is network
    assert isinstance(network, SmallNet)
    assert [one for one in layers if one not in set(network.modules())] == [layers[2]]  # the batch norm is folded
    kept = module.quantized.float_network
    assert kept is not None
    assert_same_tensors(kept.state_dict(), before)


# The same numbers as a script written by hand


@pytest.mark.parametrize("estimator", ["min_max", "tf_enhanced"])
@pytest.mark.parametrize(("weights", "activations"), [(8, 8), (4, 16)])
def test_encodings_are_those_of_a_script_written_by_hand(
    trainer: MakeTrainer, estimator: str, weights: int, activations: int
) -> None:
    from aimet_torch import QuantizationSimModel
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.common.defs import QuantScheme
    from aimet_torch.model_preparer import prepare_model

    schemes = {"min_max": QuantScheme.min_max, "tf_enhanced": QuantScheme.post_training_tf_enhanced}
    example = small_data().tensors[0][:1]
    network = prepare_model(small_net().eval())
    fold_all_batch_norms(network, None, dummy_input=example)
    sim = QuantizationSimModel(
        network,
        example,
        quant_scheme=schemes[estimator],
        default_output_bw=activations,
        default_param_bw=weights,
        config_file="htp_v75",
    )

    def run(model: nn.Module) -> None:
        with torch.no_grad():
            for images, _ in small_loader():
                model(images)

    sim.compute_encodings(run)
    state = sim.model.state_dict()
    by_hand = {k.removeprefix("module_"): v.detach() for k, v in state.items() if k.endswith((".min", ".max"))}
    module = SmallModule()
    callback = PostTrainingQuantization(f"w{weights}a{activations}", range_estimator=estimator)
    trainer(callback).fit(module, small_loader())
    assert len(by_hand) == 18
    mine = encodings(module.quantized)
    assert_same_tensors({name: mine[name] for name in by_hand}, by_hand)
    assert mine.keys() == by_hand.keys()
    with torch.no_grad():
        images = small_data().tensors[0]
        with unrounded_biases(module.quantized.modules()):  # AIMET adds them as they are
            assert torch.equal(module.quantized.eval()(images), sim.model.eval()(images).as_subclass(Tensor))


# What cannot work


@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "w3a7"}, r"Unknown precision 'w3a7': expected one of w4a8, w4a16, w8a8, w8a16"),
        ({"precision": 8}, r"Unknown precision 8"),
        ({"hardware": "htp_v76"}, r"Unknown hardware config 'htp_v76'.*Did you mean 'htp_v7"),
        ({"hardware": "missing.json"}, r"Unknown hardware config 'missing.json'"),
        ({"range_estimator": "mse"}, r"Unknown range estimator 'mse': expected one of min_max, tf_enhanced"),
        ({"calibration_samples": 0}, r"calibration_samples=0: expected a whole number"),
        ({"overrides": {"head": "w9a9"}}, r"Unknown precision 'w9a9'"),
        ({"network": ""}, r"network='': expected the name of the attribute"),
    ],
)
def test_bad_arguments(callback: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        callback(**arguments)


def test_network_that_cannot_run(trainer: MakeTrainer) -> None:
    class Failing(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError("in the network itself")

    module = SmallModule(Failing())
    with pytest.raises(
        CalibrationError, match="training_step called it with what makes it raise ZeroDivisionError: in"
    ):
        trainer(PostTrainingQuantization()).fit(module, small_loader())
    assert type(module.model) is Failing


def test_strict_refuses_a_network_with_findings(trainer: MakeTrainer) -> None:
    class NormedInput(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.first(x))

    module = SmallModule(NormedInput())
    with pytest.raises(PreflightError, match=r"strict=True(?s:.*)first +BatchNorm2d could not be folded"):
        trainer(PostTrainingQuantization(strict=True)).fit(module, small_loader())
    assert type(module.model) is NormedInput


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_no_calibration_data(trainer: MakeTrainer, stage: str) -> None:
    module = SmallModule()
    with pytest.raises(ConfigurationError, match=rf"trainer\.{stage}\(\) has no data to calibrate on"):
        getattr(trainer(PostTrainingQuantization()), stage)(module, small_loader())
    assert module.called == []


def test_empty_stage_loader(trainer: MakeTrainer) -> None:
    module = SmallModule()
    with pytest.raises(CalibrationError, match=r"data loader of trainer.predict\(\) gave no batch"):
        trainer(PostTrainingQuantization()).predict(module, small_loader(small_data(4), drop_last=True))
    assert type(module.model) is SmallNet


def test_network_replaced_after_setup(trainer: MakeTrainer) -> None:
    class Anew(SmallModule):
        def on_fit_start(self) -> None:
            self.model = small_net()

    class Ptq(PostTrainingQuantization):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.quantized_network(pl_module)

    with pytest.raises(ConfigurationError, match=r"'model' is SmallNet and not quantized.*Anew make it again"):
        trainer(Ptq()).fit(Anew(), small_loader(), small_loader())


def test_quantized_network_of_the_callback(trainer: MakeTrainer) -> None:
    module = SmallModule()
    callback = PostTrainingQuantization()
    trainer(callback).fit(module, small_loader())
    assert callback.quantized_network(module).network is module.model
