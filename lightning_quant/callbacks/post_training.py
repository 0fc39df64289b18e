"""Post-training quantization as a Lightning callback."""

from __future__ import annotations

import lightning.pytorch as pl
from typing_extensions import override

from lightning_quant.callbacks.logs import rank_zero_log
from lightning_quant.callbacks.quantization import QuantizationCallback, end_fit, quantization_callbacks
from lightning_quant.callbacks.validation import validate_in_fit


class PostTrainingQuantization(QuantizationCallback):
    """Quantize a trained network and calibrate its ranges, without any training.

    In ``validate``, ``test`` and ``predict`` the metrics and predictions are those of the quantized network.
    In ``fit`` it calibrates, runs your validation once and ends without a training step; to fine-tune, use
    :class:`QuantizationAwareTraining`. The module stays quantized afterwards: save it with
    ``trainer.save_checkpoint`` and load it with :func:`load_quantized`.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[PostTrainingQuantization("w8a8")])  # doctest: +SKIP
        >>> trainer.validate(module, datamodule=data)  # doctest: +SKIP

    Args:
        precision: bit widths, ``"w8a8"``, ``"w8a16"``, ``"w4a16"`` or ``"w4a8"``.
        network: dotted attribute of the LightningModule that holds the float ``nn.Module``.
        hardware: AIMET hardware config: an alias such as ``"htp_v75"`` (Snapdragon 8 Gen 3) or the path of
            a JSON file.
        calibration_samples: how many samples (images, not batches) the ranges are taken from.
        calibration_dataloader: the data to take them from. Default: ``datamodule.calibration_dataloader()``
            if it has one, else the training data.
        range_estimator: ``"min_max"``, ``"tf_enhanced"`` or ``"percentile"``, with options as in
            ``{"percentile": {"percentile": 99.9}}``; or a ``RangeEstimator`` of your own, an instance or the
            dotted path of the class.
        overrides: precision of single layers, as glob on the network's module names → precision.
        strict: make the warnings of the preflight errors.
        statistics_cache: folder that keeps what calibration saw, so that other precisions with the same width of
            weights, network and data need no pass of their own; their ranges are exactly the same. Not used under DDP.

    Raises:
        ConfigurationError: for an unknown value here, a Trainer that cannot work with quantization, or a
            ``network`` that is not there.
        PreflightError: when the network cannot be quantized.
        CalibrationError: when there is no calibration data, or NaN or Inf in it.
    """

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rank_zero_log("PostTrainingQuantization does not train: fit ends after calibration and validation.")
        if trainer.enable_validation and self is quantization_callbacks(trainer)[-1]:
            validate_in_fit(trainer)
        end_fit(trainer)
