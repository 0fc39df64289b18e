"""The errors this package raises on purpose.

Every message says what was given, what was expected and what to do next. All of them derive from
:class:`LightningQuantError`, and each also from the built-in class a caller would reach for, so
``except ValueError`` keeps working in programs that have never heard of this package.
"""


class LightningQuantError(Exception):
    """Base of every error raised on purpose by ``lightning_quant``."""


class ConfigurationError(LightningQuantError, ValueError):
    """An argument, a combination of arguments, or the Trainer around them cannot work."""


class UnknownDeviceError(ConfigurationError):
    """A target does not have the device that was named."""


class DataError(LightningQuantError, ValueError):
    """A data set is missing, laid out differently than expected, or holds a damaged file."""


class PreflightError(LightningQuantError, RuntimeError):
    """The network cannot be quantized as it stands (or not fully, with ``strict=True``)."""


class CalibrationError(LightningQuantError, RuntimeError):
    """Calibration saw no data, or data no range can be computed from (NaN, Inf)."""


class TrainingError(LightningQuantError, FloatingPointError):
    """Training came to NaN or infinity; the weights are those of the step before."""


class CheckpointError(LightningQuantError, RuntimeError):
    """A checkpoint does not fit the quantized network it was meant for."""


class ExportError(LightningQuantError, RuntimeError):
    """The exported files are incomplete or cannot be written."""


class ParityError(ExportError):
    """The exported model computes something else than the simulation it was exported from."""


class DeviceError(LightningQuantError, RuntimeError):
    """A device, its compiler or the service in front of it refused the model or failed."""


class DeviceFallbackError(DeviceError):
    """The NPU's compiler left every layer of a network to the CPU."""


class DeviceUnavailableError(DeviceError):
    """A target cannot be reached or is not installed here; jobs that were submitted can be resumed later."""


class DeviceTimeoutError(DeviceUnavailableError, TimeoutError):
    """A target took longer than the configured limit."""


class DeviceBoundError(DeviceError):
    """The device computes it, but not well enough for the bounds that were asked for."""
