"""Operations that ONNX or the NPU lacks, written with those they have: the same numbers, in integers on the NPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.graph.files import write_onnx
from lightning_quant.simulation.callsites.decompositions import resampling
from lightning_quant.simulation.switched_off import unrounded
from tests.helpers.networks import calibrated, call
from tests.helpers.qdq import NO_EMULATOR, computed, emulated, psnr
from tests.simulation.callsites.patterns import ReadsKept

IMAGES = torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(0))


# ---- values written into a part of a tensor --------------------------------------------------------------------------
def every_third(m: Rewritten, y: Tensor) -> Tensor:
    """As in the heads that find the joints of people: visibility and two coordinates take turns."""
    points = y.clone()
    points[:, 2::3] = points[:, 2::3].sigmoid()
    points[:, 0::3] = points[:, 0::3] * 2.0 + 0.5
    return points


def a_block(m: Rewritten, y: Tensor) -> Tensor:
    y = y * 0.5
    y[:, 1:, 2:, 2:] += y[:, 1:, :1, :1].sigmoid()
    return y


def a_number(m: Rewritten, y: Tensor) -> Tensor:
    y = y + 0.0
    y[..., 0] = 9.0
    y[:, 2, 1:3] = 0
    return y


def places_in_a_list(m: Rewritten, y: Tensor) -> Tensor:
    y = y + 0.0
    y[:, [0, 4]] = y[:, :2].sigmoid() * 9.0
    y[:, 1, torch.tensor([2, 3])] = y[:1, 5, :2]
    return y


def from_nothing(m: Rewritten, y: Tensor) -> Tensor:
    made = y.new_zeros(y.shape)
    made[:, 0::2] = y[:, 0::2].sigmoid()
    made[:, 1::2] = y[:, 1::2] * 3.0
    return made


def through_a_view(m: Rewritten, y: Tensor) -> Tensor:
    rows = y.flatten(2)
    rows[:, :2] = rows[:, 2:4].sigmoid() * 9.0
    return rows * 0.5


def rows_picked(m: Rewritten, y: Tensor) -> Tensor:
    rows = F.interpolate(y, (32, 8))[:, :, torch.arange(31, -1, -1)]
    return rows[:, :, [-1, 3, 30, 2, 5]] * 2.0 + y.index_select(2, torch.tensor([7, 0, 6, 1, 5]))


def tokens_picked(m: Rewritten, y: Tensor) -> Tensor:
    tokens = m.linear(y.flatten(2).transpose(1, 2)).repeat(1, 4, 1)
    return tokens[:, torch.arange(256).reshape(16, 16).t()].flatten(1, 2) * 0.5


def long_rows_picked(m: Rewritten, y: Tensor) -> Tensor:
    return y.flatten(2).repeat(1, 1, 5)[..., :257][..., torch.arange(256, -1, -1)].sigmoid()


def every_second_of_two_axes(m: Rewritten, y: Tensor) -> Tensor:
    y = F.interpolate(y, (16, 16))
    y[:, :, ::2, ::2] = 0.5
    made = torch.zeros_like(y)
    made[:, :, 1::2, 1::2] = y[:, :, :8, :8]
    return torch.cat([y, made], 1)


def put(m: Rewritten, y: Tensor) -> Tensor:
    return torch.index_copy(y, 1, torch.tensor([0, 4]), y[:, :2].sigmoid() * 9.0)


def put_in_place(m: Rewritten, y: Tensor) -> Tensor:
    y = y + 0.0
    y.index_copy_(1, torch.tensor([0, 4]), y[:, :2].sigmoid() * 9.0)
    return y.index_fill_(2, torch.tensor([1]), -3.0)


def scattered(m: Rewritten, y: Tensor) -> Tensor:
    at = torch.tensor([0, 4]).reshape(1, 2, 1, 1).expand(y.shape[0], 2, *y.shape[2:])
    return y.scatter(1, at, y[:, :2].sigmoid() * 9.0)


def zeros_added_to(m: Rewritten, y: Tensor) -> Tensor:
    added = torch.zeros_like(y)
    for factor in (1.0, 2.0):
        added += torch.sigmoid(y * factor)
    return added


# ---- other sizes -----------------------------------------------------------------------------------------------------
def smoothed(m: Rewritten, y: Tensor) -> Tensor:
    return F.interpolate(y, size=(13, 5), mode="bicubic", antialias=True)


def smoothed_by_a_factor(m: Rewritten, y: Tensor) -> Tensor:
    return F.interpolate(y, scale_factor=0.5, mode="bilinear", antialias=True) * 2


def positions_smoothed(m: Rewritten, y: Tensor) -> Tensor:
    return y + F.interpolate(m.positions, size=y.shape[2:], mode="bicubic", antialias=True)


def turned(m: Rewritten, y: Tensor) -> Tensor:
    """As a spatial transformer does, by angles that it computes."""
    by = y.mean((2, 3)).tanh().reshape(-1, 2, 3) * 0.3 + torch.eye(2, 3)
    y = F.avg_pool2d(y, 3, 1, 1)  # grids of 8 bits are coarse
    return F.grid_sample(y, F.affine_grid(by, list(y.shape), align_corners=False), align_corners=False)


def turned_always(m: Rewritten, y: Tensor) -> Tensor:
    by = torch.tensor([[[0.9, 0.1, 0.0], [-0.1, 0.9, 0.1]]]).repeat(y.shape[0], 1, 1)
    return F.grid_sample(y, F.affine_grid(by, list(y.shape), align_corners=False), align_corners=False)


def areas(m: Rewritten, y: Tensor) -> Tensor:
    return F.interpolate(y, scale_factor=(0.25, 0.5), mode="area")


def by_part_of_a_factor(m: Rewritten, y: Tensor) -> Tensor:
    return m.halves(y[:, :, 1:]).mean((2, 3)) - F.interpolate(
        y[:, :, :7], scale_factor=(1 / 3, 0.5), mode="bilinear"
    ).mean((2, 3))


def sequence_by_part_of_a_factor(m: Rewritten, y: Tensor) -> Tensor:
    return F.interpolate(y[:, :, 0, :7], scale_factor=1.5, mode="linear") * 2


def sums_of_rows(m: Rewritten, y: Tensor) -> Tensor:
    return torch.cumsum(y, 2) * 0.5 - y.relu().cumsum(dim=-3)


def axes_moved(m: Rewritten, y: Tensor) -> Tensor:
    y = torch.movedim(y, (1, 2), (-1, -2)).sigmoid().movedim(-1, 1)
    return y.moveaxis(-2, -1) * 3.0


def uneven_areas(m: Rewritten, y: Tensor) -> Tensor:
    return m.areas(y) + F.interpolate(y[:, :, 0], 12, mode="area")[:, :, None]


def uneven_means(m: Rewritten, y: Tensor) -> Tensor:
    return m.means(y) * F.adaptive_avg_pool1d(y[:, :, 0], 3)[:, :, None]


def uneven_maxima(m: Rewritten, y: Tensor) -> Tensor:
    return torch.cat([m.maxima(y).mean(2), F.adaptive_max_pool1d(y[:, :, 0], 3)], 2)


def uneven_volumes(m: Rewritten, y: Tensor) -> Tensor:
    volume = y[:, None]
    means = F.adaptive_avg_pool3d(volume, (4, 3, None)) + F.interpolate(volume, (4, 3, 8), mode="area")
    return means.flatten(1, 2) * F.adaptive_max_pool3d(volume, (4, 3, 8))[:, 0]


def means_by_another_count(m: Rewritten, y: Tensor) -> Tensor:
    volume = F.avg_pool3d(y[:, None], 2, divisor_override=3)[:, 0]
    return F.avg_pool2d(y, 3, 2, 1, divisor_override=5).mean() * volume - m.sums(y)[:, 1:4]


# ---- triangles, choices, parts ---------------------------------------------------------------------------------------
def triangles(m: Rewritten, y: Tensor) -> Tensor:
    return y.triu(1) - torch.tril(y * 0.5, -1)


def diagonals(m: Rewritten, y: Tensor) -> Tensor:
    return torch.diagonal(y, dim1=-2, dim2=-1).unsqueeze(-1) * y.diagonal(1, 1, 2)[:, None, :1]


def chosen_by_a_product(m: Rewritten, y: Tensor) -> Tensor:
    gated = y * (y > 0)
    gated *= torch.eye(8, dtype=torch.bool).logical_not()
    return gated.sigmoid()


def numbers_by_sign(m: Rewritten, y: Tensor) -> Tensor:
    return torch.where(y > 0, 1.5, -0.5) * y


def where_a_mask_has_it(m: Rewritten, y: Tensor) -> Tensor:
    y = y + 0.0
    y[:, torch.eye(8, dtype=torch.bool).repeat(6, 1, 1)] = 0.5
    y[..., torch.arange(8) > 5] = torch.tensor(-1.0)
    return y


def one_part_of_many(m: Rewritten, y: Tensor) -> Tensor:
    return y.split([1, 3, 2], 1)[1].sigmoid() * y.chunk(3, -1)[0].mean() - y.unbind(2)[3][:, :3, :, None]


def whole_parts(m: Rewritten, y: Tensor) -> Tensor:
    """Of numbers half way between two whole ones, which no rounding moves to another."""
    halves = y * 0.0 + torch.eye(8) * 2.0 - 0.5
    return 8.0 // (halves + 0.8) + halves // 1.0


def softplus_of_a_multiple(m: Rewritten, y: Tensor) -> Tensor:
    return F.softplus(y, beta=3.0) * 2.0 + m.softplus(y)


def patches(m: Rewritten, y: Tensor) -> Tensor:
    return F.fold(F.unfold(y, 3, padding=1, stride=2), (8, 8), 3, padding=1, stride=2)


def wide_patches(m: Rewritten, y: Tensor) -> Tensor:
    return F.fold(F.unfold(y, (2, 3), 1, (1, 0), (2, 1)), (8, 8), (2, 3), 1, (1, 0), (2, 1))


# ---- views that are changed in place ---------------------------------------------------------------------------------
def seen_by_another(m: Rewritten, y: Tensor) -> Tensor:
    y = y + 0.0
    first = y[:, :2]
    y[:, 0] = y[:, 1].sigmoid() * 9.0
    return y * first[:, :1].sigmoid()


def written_through(m: Rewritten, y: Tensor) -> Tensor:
    y = y + 0.0
    y.view(y.shape[0], 3, 2, -1)[:, :, 0] = y.view(y.shape[0], 3, 2, -1)[:, :, 1].sigmoid()
    return y * 3


def decoded(m: Rewritten, y: Tensor) -> Tensor:
    """As in YOLO's heads."""
    y = y.permute(0, 2, 3, 1).contiguous()
    y[..., :2].sigmoid_()
    y[..., :2] = y[..., :2] * 2.0 - 0.5
    return y


def halves_changed(m: Rewritten, y: Tensor) -> Tensor:
    first, second = y[:, :3], y[:, 3:]
    first.relu_().add_(second)
    torch.sigmoid_(second[:, 1:])
    return y * 2.0


def parts_overwritten(m: Rewritten, y: Tensor) -> Tensor:
    y[:, 2:4].copy_(y[:, 4:])
    y[:, :, ::3].zero_()
    y.select(1, 0).fill_(0.5)
    y.narrow(1, 1, 1).clamp_(min=0.0)
    return y


def seen_through_views(m: Rewritten, y: Tensor) -> Tensor:
    first, middle, rows = y[:, :4], y[:, 2:6], y.transpose(1, 2)[:, 1:]
    y.mul_(0.5)
    middle += 1.0
    rows[..., 3].tanh_()
    first[:, 1:][..., 2:5].mul_(3.0)
    return torch.cat([first, middle], 1) + rows.mean()


def by_layers_in_place(m: Rewritten, y: Tensor) -> Tensor:
    m.relu(y[:, :3])
    flat = y.flatten(2)
    flat[:, ::2].neg_()
    return y * 0.5


def one_after_the_other(m: Rewritten, y: Tensor) -> Tensor:
    made, state = torch.empty_like(y), torch.zeros_like(y[..., 0])
    for place in range(y.shape[-1]):
        state = state * 0.5 + y[..., place]
        made[..., place].copy_(state)
    for channel in range(2):
        made.select(1, channel).mul_(channel + 0.5)
    return made


def without_a_gradient(m: Rewritten, y: Tensor) -> Tensor:
    y.detach()[:, 1:].clamp_(-0.3, 0.3)
    return y + 0.5


# ---- functions that ONNX writes as several operations ----------------------------------------------------------------
def hyperbolic(m: Rewritten, y: Tensor) -> Tensor:
    y = y * 0.5
    return torch.sinh(y) + torch.cosh(y) * 0.5 + torch.expm1(y) + torch.tan(y * 0.5) + torch.acos(y.tanh() * 0.9)


def exponentials(m: Rewritten, y: Tensor) -> Tensor:
    return 2**y + torch.pow(1.7, y) + 0.3 ** (y * 0.5) + torch.exp2(y) + F.softmin(y, 1) + torch.hypot(y, y.flip(1))


def other_logarithms(m: Rewritten, y: Tensor) -> Tensor:
    y = y.abs() + 1.5
    return torch.log2(y) + torch.log10(y)


def activations(m: Rewritten, y: Tensor) -> Tensor:
    bent = F.selu(y) + F.celu(y, 0.7) + F.logsigmoid(y) + F.softsign(y)
    return bent + F.softshrink(y, 0.2) + F.tanhshrink(y) + F.threshold(y, 0.2, 0.2)


def activations_as_layers(m: Rewritten, y: Tensor) -> Tensor:
    return sum((one(y) for one in m.activations), y)


def spreads(m: Rewritten, y: Tensor) -> Tensor:
    deviation, mean = torch.std_mean(y, 1, keepdim=True)
    variance, other = torch.var_mean(y, (2, 3), correction=0)
    normed = (y - mean) / (deviation + 0.5) + (variance + other)[..., None, None]
    return normed + y.var(-1, unbiased=False)[..., None] + y.std(2, keepdim=True)


def vectors(m: Rewritten, y: Tensor) -> Tensor:
    alike = F.cosine_similarity(y, y.flip(1) + 0.5, 1)[:, None] + F.normalize(y, p=1.0, dim=-1)
    third = torch.cross(y[:, :3], y[:, 3:].sigmoid(), 1) + torch.linalg.cross(y[:, 3:], y[:, :3].sigmoid(), dim=1)
    return alike * torch.outer(m.norm.weight, m.norm.weight + 1.0) + torch.cat([third, third], 1)


def pairs(m: Rewritten, y: Tensor) -> Tensor:
    tokens = y.flatten(2)
    return torch.cdist(tokens, tokens[:, :2] + 1.0) * 0.1 + torch.cdist(tokens, tokens[:, 1:3].tanh(), p=1.0) * 0.01


def sums_of_three(m: Rewritten, y: Tensor) -> Tensor:
    mixed = torch.einsum("bchw,cd,bdhw->bdh", y, m.linear.weight, y.sigmoid())
    return mixed + torch.einsum("bchw->bch", y) + torch.mv(m.linear.weight, m.linear.bias)[:, None]


def finite(m: Rewritten, y: Tensor) -> Tensor:
    y = torch.where(torch.isfinite(y), y, 0.0)
    return torch.nan_to_num(y.masked_fill(y.isnan(), 0.0)).tile(1, 2, 1, 1) + torch.tile(y, (2, 1, 1))


def of_neighbors(m: Rewritten, y: Tensor) -> Tensor:
    return F.local_response_norm(y, 3, 0.5)[..., ::2, ::2] + F.lp_pool2d(y, 2.0, 2)


def along_axes(m: Rewritten, y: Tensor) -> Tensor:
    products = (y * 0.3 + 1.0).prod(1, keepdim=True) + torch.prod(y[..., :3], -1)[:, :, None]
    return products + y.logsumexp(1)[:, None] + torch.logsumexp(y, (2, 3), keepdim=True)


def powers(m: Rewritten, y: Tensor) -> Tensor:
    return (y.square() + 0.5) ** 1.5 + (y * 0.5) ** 4 + (y.abs() + 1.0) ** -1.5


# ---- layers that the NPU does not have -------------------------------------------------------------------------------
def leaky(m: Rewritten, y: Tensor) -> Tensor:
    return m.prelu(y) + F.prelu(y[:, 0], m.slopes[:1])[:, None]


def of_volumes(m: Rewritten, y: Tensor) -> Tensor:
    volumes = y.reshape(-1, 3, 2, 8, 8)
    largest = m.largest(volumes) + F.max_pool3d(volumes, (1, 3, 3), (1, 2, 2), (0, 1, 1))
    means = (
        m.averages(volumes) + F.avg_pool3d(volumes, (2, 3, 3), (1, 2, 2), (1, 1, 1), count_include_pad=False)[:, :, 1:]
    )
    return torch.cat([largest.flatten(1), means.flatten(1), F.adaptive_max_pool3d(volumes, (1, 2, 4)).flatten(1)], 1)


def windows_over_the_end(m: Rewritten, y: Tensor) -> Tensor:
    pooled = [
        F.avg_pool2d(y, 3, 2, ceil_mode=True), F.avg_pool2d(y, 3, 2, 1, ceil_mode=True), m.over_the_end(y),
        F.avg_pool2d(y, (3, 1), (2, 2), (1, 0), True, False),
        F.avg_pool1d(y.flatten(1, 2), 3, 2, ceil_mode=True).unflatten(1, (6, 8))[:, :, ::2],
    ]  # fmt: skip
    return sum((one[..., :4, :4] for one in pooled[1:]), pooled[0][..., :4, :4])


def cut_off_at_the_left(m: Rewritten, y: Tensor) -> Tensor:
    y = y + 0.5
    y[..., :2] = 0.0
    y[:, 1:4, 2:5, 0] = 0.3
    y[:, 4:, :3, :1].zero_()
    y[:, 5, ..., 0].fill_(-0.2)
    return F.avg_pool2d(y, 2)


def repeated_views(m: Rewritten, y: Tensor) -> Tensor:
    y = y + 0.0
    shared = y.mean((2, 3), keepdim=True)
    everywhere, repeated, windows = shared.expand_as(y), y[:, :1].expand(-1, 6, -1, -1), y.unfold(3, 4, 2)
    shared.mul_(0.5)
    y[:, 0].mul_(2.0)
    return everywhere + repeated * 0.5 + windows.mean(-1).mean(-1, keepdim=True)


def norm_of_maps(m: Rewritten, y: Tensor) -> Tensor:
    return m.norm_of_maps(y) + F.layer_norm(y, (8, 8))


# ---- norms without a bias --------------------------------------------------------------------------------------------
def by_a_weight(m: Rewritten, y: Tensor) -> Tensor:
    return F.layer_norm(y, (8,), m.positions[0, 0, 0, :1] + torch.arange(8.0))


def by_nothing(m: Rewritten, y: Tensor) -> Tensor:
    return F.layer_norm(y, (8,))


def of_a_layer(m: Rewritten, y: Tensor) -> Tensor:
    return m.norm(y)


# ---- more axes than the NPU has --------------------------------------------------------------------------------------
def windows_of_an_image(m: Rewritten, y: Tensor) -> Tensor:
    parts = y.reshape(-1, 6, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1)
    return m.linear(parts).reshape(-1, 4, 16, 6)


def queries_keys_values(m: Rewritten, y: Tensor) -> Tensor:
    groups = y.flatten(2).reshape(-1, 4, 8, 3, 2, 2).permute(3, 0, 1, 4, 2, 5)
    query, key, value = groups.unbind(0)
    return (query @ key.transpose(-2, -1)).softmax(-1) @ value


def queries_keys_values_split(m: Rewritten, y: Tensor) -> Tensor:
    query, key, value = y.flatten(2).reshape(-1, 4, 8, 3, 2, 2).permute(3, 0, 1, 4, 2, 5).chunk(3)
    return query.squeeze(0) * key.squeeze(0).sigmoid() + value.squeeze(0)


def rows_and_columns(m: Rewritten, y: Tensor) -> Tensor:
    scores = y.reshape(-1, 1, 2, 4, 6, 8)
    rows, columns = y[:, :, :, 0].mean(1), y[:, :, 0].mean(1)
    scores = scores + rows[:, None, :2, None, None, None] + columns[:, None, None, None, None]
    scores = scores * 0.3 * torch.arange(1.0, 7.0).reshape(1, 1, 1, 1, 6, 1)
    return scores.reshape(-1, 8, 48)


REWRITTEN = [
    every_third, a_block, a_number, places_in_a_list, from_nothing, through_a_view, rows_picked, tokens_picked,
    long_rows_picked, every_second_of_two_axes, put, put_in_place, scattered,
    seen_by_another, written_through, decoded, halves_changed, parts_overwritten, seen_through_views,
    by_layers_in_place, one_after_the_other, without_a_gradient, hyperbolic, exponentials, other_logarithms,
    activations,
    windows_over_the_end, cut_off_at_the_left, repeated_views, along_axes, powers, leaky, of_volumes, norm_of_maps,
    activations_as_layers, spreads, vectors, pairs, sums_of_three, finite, of_neighbors,
    zeros_added_to, smoothed, smoothed_by_a_factor, positions_smoothed, turned, turned_always, areas,
    means_by_another_count, triangles, diagonals, chosen_by_a_product, numbers_by_sign, where_a_mask_has_it,
    one_part_of_many, whole_parts, softplus_of_a_multiple,
    by_part_of_a_factor, sequence_by_part_of_a_factor, sums_of_rows, axes_moved, uneven_areas, uneven_means,
    uneven_maxima, uneven_volumes, patches, wide_patches, by_a_weight, by_nothing, of_a_layer, windows_of_an_image,
    queries_keys_values, queries_keys_values_split, rows_and_columns,
]  # fmt: skip


class Rewritten(nn.Module):
    def __init__(self, function: Callable[[Rewritten, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(3, 6, 3)
        self.linear = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(8, bias=False)
        self.areas = nn.Upsample((4, 12), mode="area")
        self.sums = nn.AvgPool2d(2, divisor_override=1)
        self.softplus = nn.Softplus(beta=0.5)
        self.relu = nn.ReLU(inplace=True)
        self.over_the_end = nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)
        self.prelu, self.slopes = nn.PReLU(6), nn.Parameter(torch.rand(6))
        self.largest, self.averages = nn.MaxPool3d((1, 2, 2)), nn.AvgPool3d((1, 2, 2), divisor_override=2)
        self.norm_of_maps = nn.LayerNorm((6, 8, 8))
        self.activations = nn.ModuleList(
            (nn.SELU(), nn.CELU(0.7), nn.LogSigmoid(), nn.Softsign(), nn.Softshrink(0.2), nn.Tanhshrink(),
             nn.Threshold(0.2, 0.2), nn.Softmin(1), nn.LocalResponseNorm(3))
        )  # fmt: skip
        self.halves = nn.Upsample(scale_factor=0.5, mode="bilinear")
        self.means, self.maxima = nn.AdaptiveAvgPool2d((None, 3)), nn.AdaptiveMaxPool2d((3, 5))
        self.positions = nn.Parameter(torch.randn(1, 6, 7, 7))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.conv(x))


@pytest.mark.parametrize("function", REWRITTEN)
def test_every_value_is_rounded_and_the_npu_computes_it(
    tmp_path: Path, function: Callable[[Rewritten, Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    network = Rewritten(function).eval()
    float_network = copy.deepcopy(network)
    known = calibrated(network, call(IMAGES))
    expected = float_network(IMAGES)
    with unrounded(known):
        torch.testing.assert_close(known.network(IMAGES), expected, rtol=0, atol=1e-5)
    rounded = known.network(IMAGES).detach()
    assert len(rounded[0].unique()) <= 256
    assert (rounded - expected).abs().max() < 0.05 * (expected.max() - expected.min())
    bundle = export_bundle(known, tmp_path / "bundle", [call(IMAGES)])
    assert bundle.manifest.parity.psnr_db > 50
    if NO_EMULATOR is None:
        report, (output,) = emulated(onnx.load(bundle.qdq), tmp_path / "device", **{"x": IMAGES[:1].numpy()})
        assert not report.float_islands
        assert not report.layers["CPU"]
        step = float(rounded.max() - rounded.min()) / 255
        steps_off = (torch.from_numpy(output) - rounded[:1]).abs() / step
        assert (steps_off > 3.1).float().mean() < 0.005  # a norm makes more of one step before it


def where_negative(m: Rewritten, y: Tensor) -> Tensor:
    y = y + 0.0
    y[y < 0] = y[y < 0] * 0.1
    return y


def windows(m: Rewritten, y: Tensor) -> Tensor:
    return y.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2))


def maxima_and_places(m: Rewritten, y: Tensor) -> Tensor:
    largest, places = F.adaptive_max_pool2d(y, 3, return_indices=True)
    return largest * places.remainder(2)


def dilated_patches(m: Rewritten, y: Tensor) -> Tensor:  # the NPU has no dilated transposed convolution
    return F.fold(F.unfold(y, 3, 2, 2), (8, 8), 3, 2, 2)


@pytest.mark.parametrize("function", [dilated_patches, maxima_and_places, where_negative, windows])
def test_writes_that_are_not_rewritten_compute_the_same(function: Callable[[Rewritten, Tensor], Tensor]) -> None:
    network = Rewritten(function).eval()
    float_network = copy.deepcopy(network)
    known = calibrated(network, call(IMAGES))
    with unrounded(known):
        torch.testing.assert_close(known.network(IMAGES), float_network(IMAGES), rtol=0, atol=1e-5)


class Normalized(nn.Module):
    """An image whose colors are normalized one after the other, in a copy of it."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.conv, self.in_place = nn.Conv2d(3, 4, 3), in_place

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for color in range(3):
            if self.in_place:
                x[:, color].sub_(0.4 + color / 20).div_(0.3 - color / 20)
            else:
                x[:, color] = (x[:, color] - 0.4) / (0.2 + color / 10)
        return self.conv(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_colors_normalized_one_by_one(tmp_path: Path, in_place: bool, seed: int) -> None:
    torch.manual_seed(seed)
    network, colors = Normalized(in_place).eval(), torch.rand(8, 3, 10, 10)
    float_network = copy.deepcopy(network)
    known = calibrated(network, call(colors))
    with unrounded(known):
        torch.testing.assert_close(known.network(colors), float_network(colors), rtol=0, atol=1e-5)
    assert export_bundle(known, tmp_path / "bundle", [call(colors)]).manifest.parity.psnr_db > 50


def test_attributes_hold_tensors_as_changed_in_place() -> None:
    network = ReadsKept().eval()
    float_network = copy.deepcopy(network)
    known = calibrated(network, call(IMAGES))
    with unrounded(known):
        known.network(IMAGES)
    float_network(IMAGES)
    for actual, expected in zip(known.network.read(), float_network.read(), strict=True):  # type: ignore[operator]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_hooks_receive_tensors_as_changed_in_place() -> None:
    network = ReadsKept().eval()
    float_network = copy.deepcopy(network)
    seen: list[Tensor] = []
    for one in (network, float_network):
        one.part.register_forward_hook(lambda _, __, output: seen.append(output))
    known = calibrated(network, call(IMAGES))
    seen.clear()
    with unrounded(known):
        known.network(IMAGES)
    float_network(IMAGES)
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-5)


def test_the_file_averages_an_image_in_blocks_of_unequal_size(tmp_path: Path) -> None:
    network = nn.Sequential(nn.AdaptiveAvgPool2d((3, 4)), nn.Conv2d(3, 4, 1)).eval()
    known = calibrated(network, call(IMAGES))
    bundle = export_bundle(known, tmp_path / "bundle", [call(IMAGES)])
    assert bundle.manifest.parity.psnr_db > 90
    sizes = call(torch.randn(2, 3, 12, 16))  # equal blocks
    with unrounded(known):
        torch.testing.assert_close(sizes.call(known.network), sizes.call(network), rtol=0, atol=1e-5)


def overlapping_windows(m: Rewritten, y: Tensor) -> Tensor:
    return y.unfold(-1, 4, 2).mean(-1)


@pytest.mark.parametrize(("function", "slices"), [(windows, 0), (overlapping_windows, 3)])
def test_windows_side_by_side_are_no_slices_in_the_file(
    tmp_path: Path, function: Callable[[Rewritten, Tensor], Tensor], slices: int
) -> None:
    known = calibrated(Rewritten(function).eval(), call(IMAGES))
    write_onnx(known, call(IMAGES[:1]), tmp_path / "float.onnx", tmp_path / "qdq.onnx")
    model = onnx.load(tmp_path / "qdq.onnx")
    joined = [len(node.input) for node in model.graph.node if node.op_type == "Concat"]
    assert sum(joined) == slices
    with torch.no_grad():
        expected = known.network(IMAGES[:1])
    (name,) = [one.name for one in model.graph.input]
    actual = computed(model, tmp_path, **{name: IMAGES[:1].numpy()})[0]
    np.testing.assert_allclose(actual, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(("dimension", "size"), [(0, 2), (1, 3), (-1, 4), (3, 5)])
def test_windows_are_those_of_unfold(dimension: int, size: int) -> None:
    assert torch.equal(resampling.windows(IMAGES, dimension, size, size), IMAGES.unfold(dimension, size, size))


class Masked(nn.Module):
    """Attention whose mask is a number for minus infinity times an input, as transformers' models have it."""

    def __init__(self, number: float, swapped: bool) -> None:
        super().__init__()
        self.number, self.swapped = number, swapped
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = 1.0 - mask[:, None].float()
        added = self.number * hidden if self.swapped else hidden * self.number
        scores = self.query(x) @ self.key(x).transpose(1, 2) / 4
        return (scores + added).softmax(-1) @ self.value(x)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("number", [torch.finfo(torch.float32).min, torch.finfo(torch.float16).min, -1e9, -10000.0])
def test_a_mask_that_is_a_product_leaves_the_scores_their_steps(tmp_path: Path, number: float, swapped: bool) -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(8, 12, 16), (torch.arange(12) < 9).long().repeat(8, 1)
    network = Masked(number, swapped).eval()
    float_network = copy.deepcopy(network)
    known = calibrated(network, call(x, mask))
    expected, rounded = float_network(x, mask).detach(), known.network(x, mask).detach()
    with unrounded(known):
        torch.testing.assert_close(known.network(x, mask), expected, rtol=0, atol=1e-5)
    assert psnr(expected.numpy(), rounded.numpy()) > 24  # 8 with the range of the number
    bundle = export_bundle(known, tmp_path / "bundle", [call(x, mask)])
    assert bundle.manifest.parity.psnr_db > 60


@pytest.mark.parametrize("number", [-1e3, -12345.0, -3e4, 1e9])
def test_a_factor_that_may_be_a_unit_stays_a_product(number: float) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), Product(number)).eval()
    float_network = copy.deepcopy(network)
    known = calibrated(network, call(IMAGES))
    with unrounded(known):
        torch.testing.assert_close(known.network(IMAGES), float_network(IMAGES))
    assert psnr(float_network(IMAGES).detach().numpy(), known.network(IMAGES).detach().numpy()) > 35


class Product(nn.Module):
    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return x * self.number
