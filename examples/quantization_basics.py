"""What quantization does to numbers, in four pictures: scale and zero point, weights, activations, precisions.

Run: python examples/quantization_basics.py   (seconds; the pictures go to outputs/quantization_basics)
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from aimet_torch.quantization.affine import Quantize, QuantizeDequantize
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torchmetrics.functional.audio import signal_noise_ratio
from torchvision.transforms.functional import to_tensor

from lightning_quant import Precision
from lightning_quant.domains.segmentation.ffnet import ffnet_nano
from lightning_quant.domains.segmentation.scenes import draw_scene

PICTURES = Path("outputs/quantization_basics")
BLUE, ORANGE, RED, GRAY = "tab:blue", "tab:orange", "tab:red", "0.6"


def quantize(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    """The formula that everything else rests on: floats become whole numbers between 0 and 2**bits - 1."""
    return (torch.round(x / scale) + zero_point).clamp(0, 2**bits - 1)


def dequantize(q: Tensor, scale: float, zero_point: int) -> Tensor:
    """The way back: which float a whole number stands for."""
    return (q - zero_point) * scale


def scale_and_zero_point() -> None:
    """One number, 12.5, on its way to an integer and back."""
    x, scale, bits = torch.tensor(12.5), 2.35, 3
    print("1. Scale and zero point")
    figure, axes = plt.subplots(2, 1, figsize=(10, 6), layout="constrained")
    for axis, zero_point in zip(axes, (0, 1), strict=True):
        q = quantize(x, scale, zero_point, bits)
        back = dequantize(q, scale, zero_point)
        library = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 2**bits - 1)  # both ways at once
        assert torch.equal(back, library)
        error = (x - back).abs()
        print(f"   round({x:g} / {scale}) + {zero_point} = {q:g}; back: ({q:g} - {zero_point}) * {scale} = {back:g}")
        _draw_number_line(axis, x.item(), q.item(), back.item(), scale, zero_point, bits)
    low, high = (dequantize(torch.tensor(q), scale, zero_point) for q in (0, 2**bits - 1))
    print(f"   The error is {error:g}: rounding costs up to half a step, {scale / 2:g} here.")
    print("   The scale is the width of a step. The zero point is the integer that stands for 0.0, which is exact.")
    print(f"   {bits} bits with zero point {zero_point} reach from {low:g} to {high:g}; what is beyond is clipped.\n")
    figure.savefig(PICTURES / "1_scale_and_zero_point.png", dpi=120)


def _draw_number_line(axis: Axes, x: float, q: float, back: float, scale: float, zero_point: int, bits: int) -> None:
    for integer in range(2**bits):
        value = (integer - zero_point) * scale
        axis.plot([value, value], [0, 1], color=ORANGE if integer == q else GRAY, lw=1)
        axis.annotate(f"{value:g}", (value, 0), (0, -6), textcoords="offset points", ha="center", va="top")
        axis.annotate(f"{integer}", (value, 1), (0, 6), textcoords="offset points", ha="center", color=ORANGE)
    axis.axhline(0, color="black", lw=1)
    axis.axhline(1, color=ORANGE, lw=1)
    axis.annotate("", (back, 1), (x, 0), arrowprops={"arrowstyle": "->", "color": BLUE})
    axis.annotate("", (back, 0), (back, 1), arrowprops={"arrowstyle": "->", "color": ORANGE})
    axis.plot(x, 0, "o", color=BLUE, zorder=3)
    axis.plot([back, x], [0, 0], color=RED, lw=5, solid_capstyle="butt")
    over_grid = {"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1}}
    axis.text(x + 0.25, 0.45, f"round({x:g} / {scale}) + {zero_point} = {q:g}", color=BLUE, **over_grid)
    axis.text(back - 0.25, 0.45, f"({q:g} - {zero_point}) × {scale} = {back:g}", color=ORANGE, ha="right", **over_grid)
    axis.text(x + 0.25, 0.12, f"error {abs(x - back):g}", color=RED, **over_grid)
    axis.set(xlim=(-4.5, 18), ylim=(-0.25, 1.25), title=f"scale {scale}, zero point {zero_point}, {bits} bits")
    axis.text(-4.5, 1, "integers", color=ORANGE, va="bottom")
    axis.text(-4.5, 0, "floats", va="bottom")
    axis.axis("off")


def weights(weight: Tensor) -> None:
    """A convolution's weights lie around zero: symmetric, zero point 0, and the step follows from the largest."""
    low, high = weight.aminmax()
    print(f"2. Weights: a convolution of FFNet-nano has {weight.numel()}, from {low:.3f} to {high:.3f}")
    figure, axes = plt.subplots(2, 1, figsize=(10, 6), sharex=True, layout="constrained")
    for axis, bits in zip(axes, (8, 4), strict=True):
        quantizer = calibrated(Quantize((), bitwidth=bits, symmetric=True), weight)
        integers = quantizer(weight)
        step = integers.encoding.scale.item()
        stored = integers.to(torch.int8).nbytes * bits // 8  # two 4-bit integers share a byte
        smaller = weight.nbytes // stored
        print(f"   {bits} bits: step {step:.5f}; {weight.nbytes} bytes become {stored}, {smaller}x smaller")
        values, counts = integers.dequantize().unique(return_counts=True)
        edges = torch.arange(-(2 ** (bits - 1)) - 0.5, 2 ** (bits - 1)) * step  # halfway between two steps
        axis.hist(weight.flatten(), edges, color=BLUE, alpha=0.3, label="floats that are rounded to it")
        axis.vlines(values, 0, counts, color=ORANGE, lw=1 if bits == 8 else 3, label=f"{bits}-bit value")
        axis.set(title=f"{bits} bits: steps of {step:.4f}", ylabel="weights", xlim=(-0.4, 0.4))
        axis.legend()
    print("   A float takes 4 bytes, an 8-bit integer 1; of 4-bit integers two share one.\n")
    axes[-1].set_xlabel("value")
    figure.savefig(PICTURES / "2_weights.png", dpi=120)


def sigmoid() -> None:
    """An activation's range depends on the data, so it is measured: that is what calibration does."""
    x = torch.linspace(-8, 8, 2001)
    y = torch.sigmoid(x)
    print("3. Activations: a sigmoid, whose values lie between 0 and 1")
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    for column, bits in enumerate((4, 8)):
        rounded = calibrated(QuantizeDequantize((), bitwidth=bits, symmetric=False), y)(y)
        error, levels = rounded - y, len(rounded.unique())
        print(f"   {bits} bits: {levels} values are left, the largest error is {error.abs().max():.5f}")
        curve, difference = axes[:, column]
        curve.plot(x, y, color=BLUE, label="float")
        curve.plot(x, rounded, color=ORANGE, label=f"{bits} bits")
        curve.set_title(f"{bits} bits: {levels} values")
        curve.legend()
        difference.plot(x, error, color=RED, lw=0.8)
        difference.set(xlabel="input", ylim=(-0.04, 0.04))
    axes[0, 0].set_ylabel("sigmoid")
    axes[1, 0].set_ylabel("error")
    print("   Each bit more halves the step, and the error with it.\n")
    figure.savefig(PICTURES / "3_sigmoid.png", dpi=120)


def precisions(activation: Tensor, weight: Tensor) -> None:
    """The same convolution of the same activation at three precisions."""
    print("4. Precisions: WxAy has x-bit weights and y-bit activations. SNR in dB (more is better) of one convolution:")
    print("           weights   activations   output")
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for place, precision in enumerate(Precision.parse(name) for name in ("w8a8", "w8a16", "w4a16")):
        # One range for each output channel of the weights, as the NPU has it; one for the whole activation.
        weight_quantizer = QuantizeDequantize((len(weight), 1, 1, 1), bitwidth=precision.weight_bits, symmetric=True)
        activation_quantizer = QuantizeDequantize((), bitwidth=precision.activation_bits, symmetric=False)
        rounded_weight = calibrated(weight_quantizer, weight)(weight)
        rounded = calibrated(activation_quantizer, activation)(activation)
        pairs = {
            "weights": (rounded_weight, weight),
            "activations": (rounded, activation),
            "output": (conv2d(rounded, rounded_weight), conv2d(activation, weight)),
        }
        snr = [signal_noise_ratio(ours.flatten(), exact.flatten()).item() for ours, exact in pairs.values()]
        print(f"   {str(precision).upper():6} {snr[0]:9.1f} {snr[1]:13.1f} {snr[2]:8.1f}")
        bars = axis.bar([group + 0.27 * place for group in range(3)], snr, 0.25, label=str(precision).upper())
        axis.bar_label(bars, fmt="%.0f", padding=2)
    print("   6 dB are one bit. The coarser of weights and activations decides how good the output is.")
    axis.set_xticks([group + 0.27 for group in range(3)], list(pairs))
    axis.set(ylabel="signal to noise, dB", ylim=(0, 110), title="one convolution of FFNet-nano")
    axis.legend()
    figure.savefig(PICTURES / "4_precisions.png", dpi=120)


def calibrated(quantizer: Quantize | QuantizeDequantize, values: Tensor) -> Quantize | QuantizeDequantize:
    """AIMET's quantizer, its scale and zero point taken from the smallest and largest of ``values``."""
    with quantizer.compute_encodings():
        quantizer(values)
    return quantizer


def input_of(layer: nn.Module, network: nn.Module, image: Tensor) -> Tensor:
    """What reaches ``layer`` when ``network`` sees ``image``."""
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    network(image)
    return seen[0]


torch.manual_seed(0)
PICTURES.mkdir(parents=True, exist_ok=True)
with torch.no_grad():
    network = ffnet_nano().eval()
    layer = network.get_submodule("backbone_model.layer2.0.conv2")
    photo, _ = draw_scene(128, 256, seed=0, split="train", index=0)
    scale_and_zero_point()
    weights(layer.weight)
    sigmoid()
    precisions(input_of(layer, network, to_tensor(photo)[None]), layer.weight)
print(f"\nPictures: {', '.join(sorted(str(path) for path in PICTURES.glob('*.png')))}")
