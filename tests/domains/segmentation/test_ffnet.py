"""FFNet against the published names and graph, and against what AIMET asks of a network."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.domains.segmentation.ffnet import FFNet, ffnet_40s, ffnet_54s, ffnet_78s, ffnet_nano
from lightning_quant.errors import ConfigurationError

PUBLISHED = json.loads((Path(__file__).parent / "ffnet_state_dicts.json").read_text())
VARIANTS = {
    "ffnet40S_dBBB_mobile": ffnet_40s,
    "ffnet54S_dBBB_mobile": ffnet_54s,
    "ffnet78S_dBBB_mobile": ffnet_78s,
}


def randomize(network: nn.Module) -> nn.Module:
    """Give every batch norm its own statistics, so that no two of them can be mixed up unnoticed."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name, value in module.state_dict().items():  # shares the memory of the module's tensors
                if name in ("weight", "running_var"):
                    value.uniform_(0.5, 1.5, generator=generator)
                elif name in ("bias", "running_mean"):
                    value.uniform_(-0.5, 0.5, generator=generator)
    return network.eval()


def published_forward(state: dict[str, Tensor], x: Tensor, first_stride: int) -> Tensor:
    """The published graph, written out over the names of its state dict."""

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[name + ".weight"]
        return F.conv2d(x, weight, state.get(name + ".bias"), stride, weight.shape[-1] // 2)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = state[name + ".running_mean"], state[name + ".running_var"]
        return F.batch_norm(x, mean, var, state[name + ".weight"], state[name + ".bias"])

    def cbr(x: Tensor, name: str) -> Tensor:
        return norm(conv(x, name + ".layers.0"), name + ".layers.1").relu()

    def up(x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, like.shape[-2:], mode="nearest")

    for i in "01":
        x = norm(conv(x, f"backbone_model.conv{i}", 2), f"backbone_model.bn{i}").relu()
    scales = []
    for layer in range(1, 5):
        block = 0
        while (name := f"backbone_model.layer{layer}.{block}") + ".conv1.weight" in state:
            stride = (first_stride if layer == 1 else 2) if block == 0 else 1
            y = norm(conv(x, name + ".conv1", stride), name + ".bn1").relu()
            y = norm(conv(y, name + ".conv2"), name + ".bn2")
            if name + ".downsample.0.weight" in state:
                x = norm(conv(x, name + ".downsample.0", stride), name + ".downsample.1")
            x = (x + y).relu()
            block += 1
        scales.append(x)
    f4, f8, f16, f32 = (cbr(x, f"head.layers.0.adapter_conv.{i}") for i, x in enumerate(scales))
    f16 = f16 + up(cbr(f32, "head.layers.1.fam_32_up"), f16)
    f8 = f8 + up(cbr(f16, "head.layers.1.fam_16_up"), f8)
    f4 = f4 + up(cbr(f8, "head.layers.1.fam_8_up"), f4)
    out = cbr(f4, "head.layers.1.fam_4")
    for feature, name in ((f8, "fam_8_sm"), (f16, "fam_16_sm"), (f32, "fam_32_sm")):
        out = torch.cat([out, up(cbr(feature, f"head.layers.1.{name}"), out)], dim=1)
    out = norm(conv(out, "head.layers.3.last_layer.0"), "head.layers.3.last_layer.1").relu()
    return conv(out, "head.layers.3.last_layer.3")


@pytest.mark.parametrize("name", VARIANTS)
def test_names_shapes_and_parameters_are_the_published_ones(name: str) -> None:
    network = VARIANTS[name]()
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == PUBLISHED[name]["state"]
    assert sum(p.numel() for p in network.parameters()) == PUBLISHED[name]["parameters"]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_published_checkpoint_loads_strictly(name: str) -> None:
    network = VARIANTS[name]()
    state = {key: torch.full(shape, 7.0) for key, shape in PUBLISHED[name]["state"].items()}
    network.load_state_dict(state, strict=True)
    assert all((value == 7).all() for value in network.state_dict().values())


@pytest.mark.parametrize(("build", "first_stride", "size"), [(ffnet_40s, 2, (64, 96)), (ffnet_nano, 1, (96, 100))])
def test_computes_the_published_graph(build: Callable[[], FFNet], first_stride: int, size: tuple[int, int]) -> None:
    network = randomize(build())
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        found, expected = network(image), published_forward(network.state_dict(), image, first_stride)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(64, 128), (100, 150), (37, 41)])
def test_logits_are_an_eighth_of_any_size(size: tuple[int, int]) -> None:
    with torch.no_grad():
        logits = ffnet_40s(num_classes=5).eval()(torch.randn(1, 3, *size))
    assert logits.shape == (1, 5, -(-size[0] // 8), -(-size[1] // 8))


def test_nano_is_small_and_starts_from_an_even_guess() -> None:
    network = ffnet_nano()
    assert 150_000 < sum(p.numel() for p in network.parameters()) < 500_000
    logits = network(torch.randn(4, 3, 128, 256))
    targets = torch.randint(0, 19, (4, *logits.shape[-2:]))
    assert F.cross_entropy(logits, targets).item() == pytest.approx(torch.tensor(19.0).log().item(), rel=0.05)


def test_no_relu_is_called_twice_or_in_place() -> None:
    network = ffnet_nano().eval()
    calls: Counter[nn.Module] = Counter()
    relus = [module for module in network.modules() if isinstance(module, nn.ReLU)]
    for relu in relus:
        relu.register_forward_hook(lambda module, _, __: calls.update([module]))
    network(torch.randn(1, 3, 64, 64))
    assert not any(relu.inplace for relu in relus)
    assert all(calls[relu] == 1 for relu in relus)


def test_num_classes_below_one_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="num_classes=0: FFNet needs at least 1"):
        ffnet_nano(num_classes=0)


def test_aimet_prepares_folds_and_simulates_it() -> None:
    from aimet_torch import QuantizationSimModel
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.model_preparer import prepare_model

    network = randomize(ffnet_nano())
    image, other_size = torch.randn(2, 3, 128, 256), torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        expected, expected_other = network(image), network(other_size)
        prepared = prepare_model(network)
        # What is left outside modules reads sizes; everything that computes has a module to quantize.
        functions = {node.target.__name__ for node in prepared.graph.nodes if node.op == "call_function"}
        assert functions <= {"getattr", "getitem"}
        assert not [node for node in prepared.graph.nodes if node.op == "call_method"]
        torch.testing.assert_close(prepared(other_size), expected_other)

        fold_all_batch_norms(prepared, None, dummy_input=image)
        torch.testing.assert_close(prepared(image), expected, rtol=1e-3, atol=1e-3)
        sim = QuantizationSimModel(prepared, image, config_file="htp_v75")
        sim.compute_encodings(lambda model: model(image))
        error = sim.model(image).as_subclass(Tensor) - expected
        assert 0 < error.square().mean() < 0.05 * expected.square().mean()
        assert sim.model(other_size).shape == expected_other.shape
