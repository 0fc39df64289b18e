"""What the stand-in compiles and computes, against ONNX Runtime and by hand."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from qai_hub import Client, public_rest_api
from qai_hub.client import SourceModelType, UserError

from lightning_quant.deploy.bundle import Bundle
from tests.aihub import compiler, runner
from tests.aihub.driving import S24, Array, compiled, failure, images, onnxruntime_outputs, outputs, psnr, real_numbers
from tests.aihub.speed import speed_up
from tests.aihub.standin import StandIn

pytestmark = pytest.mark.slow


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as zipped:
        for name, content in files.items():
            zipped.writestr(name, content)
    return path


@pytest.mark.parametrize(("precision", "bar"), [("w8a8", 35), ("w4a8", 35), ("w8a16", 55)])
@pytest.mark.parametrize("quantize_io", ["", "--quantize_io"])
def test_a_bundle_computes_what_its_qdq_file_computes(
    client: Client, bundles: dict[str, Bundle], precision: str, bar: float, quantize_io: str
) -> None:
    bundle, inputs = bundles[precision], images(16)
    expected = onnxruntime_outputs(bundle.qdq, inputs)
    target = compiled(client, bundle.aimet, quantize_io)

    agreement = psnr(expected, real_numbers(target, outputs(client, target, {"x": inputs})))

    assert agreement >= bar
    without_encodings = psnr(expected, onnxruntime_outputs(bundle.aimet / "model.onnx", inputs))
    assert agreement > without_encodings + 6, "the encodings were not applied"


@pytest.mark.parametrize("as_directory", [False, True])
def test_a_qdq_model_runs_as_it_is(
    client: Client, bundles: dict[str, Bundle], tmp_path: Path, as_directory: bool
) -> None:
    path = bundles["w8a16"].qdq
    if as_directory:
        path = archive(tmp_path / "qdq.onnx.zip", {"qdq.onnx/model.onnx": path.read_bytes()})
    model = client.upload_model(path)
    target = compiled(client, model, "--quantize_io")

    computed = real_numbers(target, outputs(client, target, {"x": images()}))

    assert model.model_type == SourceModelType.ONNX
    assert target.output_spec[None][0].dtype == "uint16"
    assert psnr(onnxruntime_outputs(bundles["w8a16"].qdq, images()), computed) > 100


def test_an_onnx_model_needs_no_compile_job(client: Client, bundles: dict[str, Bundle]) -> None:
    model = client.upload_model(bundles["w8a8"].qdq)

    (scores,) = outputs(client, model, {"x": images(1)})["output"]

    np.testing.assert_array_equal(scores, onnxruntime_outputs(bundles["w8a8"].qdq, images(1)))


def encoded(op: str, weight: Array, entry: dict[str, Any]) -> Array:
    """What a graph with one weight computes of ones once its encoding is applied."""
    rank = 4 if op.startswith("Conv") else 2
    x = np.ones((1, weight.shape[1 if op == "Conv" else 0], 1, 1)[:rank], np.float32)
    node = helper.make_node(op, ["x", "w"], ["y"])
    graph = helper.make_graph(
        [node], "graph", [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    source = compiler.Source(model, parameters={"w": compiler.Encoding.from_aimet({"bw": 8, **entry})})
    made = compiler.compile_source(source, compiler.CompileOptions(), {}, "model.dlc")
    return runner.run(made, {"x": [x]})["y"][0].reshape(-1)


@pytest.mark.parametrize(
    ("op", "shape"), [("Conv", (2, 1, 1, 1)), ("ConvTranspose", (1, 2, 1, 1)), ("Gemm", (1, 2)), ("MatMul", (1, 2))]
)
def test_each_channel_has_its_own_scale(op: str, shape: tuple[int, ...]) -> None:
    weight = np.array([0.6, 100.0], np.float32).reshape(shape)

    result = encoded(op, weight, {"scale": [0.25, 0.5], "offset": [-128, -128]})

    np.testing.assert_array_equal(result, [0.5, 63.5])  # 0.6 → 2 steps of 0.25, 100 is clipped to 127 steps of 0.5


def test_one_scale_for_a_whole_tensor_that_is_not_symmetric() -> None:
    weight = np.array([[-1.0, 0.6]], np.float32)

    result = encoded("MatMul", weight, {"scale": [0.25], "offset": [-2]})

    np.testing.assert_array_equal(result, [-0.5, 0.5])  # from −2 to 253 steps


@pytest.mark.parametrize(
    ("precision", "options", "dtype"),
    [
        ("w8a8", "--target_runtime qnn_dlc --quantize_io", "uint8"),
        ("w8a16", "--target_runtime qnn_context_binary --quantize_io", "uint16"),
        ("w8a8", "--target_runtime tflite --quantize_io", "int8"),
        ("w8a8", "--target_runtime tflite --quantize_io --quantize_io_type uint8", "uint8"),
        ("w8a8", "--target_runtime tflite", "float32"),
    ],
)
def test_types_of_inputs_and_outputs(
    client: Client, bundles: dict[str, Bundle], precision: str, options: str, dtype: str
) -> None:
    target = compiled(client, bundles[precision].aimet, options)
    (output,), (given,) = target.output_spec[None], target.input_spec[None]
    computed = outputs(client, target, {"x": images()})

    assert {str(computed["output"][0].dtype), output.dtype, given.dtype} == {dtype}
    assert (output.scale is None) == (output.zero_point is None) == (dtype == "float32")
    assert psnr(onnxruntime_outputs(bundles[precision].qdq, images()), real_numbers(target, computed)) > 35


def test_integer_inputs_are_taken_as_steps(client: Client, bundles: dict[str, Bundle]) -> None:
    target = compiled(client, bundles["w8a8"].aimet, "--quantize_io")
    (spec,) = target.input_spec[None]
    steps = [np.clip(np.rint(x / spec.scale) + spec.zero_point, 0, 255).astype(np.uint8) for x in images()]

    of_steps, of_floats = (outputs(client, target, {"x": values})["output"] for values in (steps, images()))

    np.testing.assert_array_equal(of_steps, of_floats)


def test_outputs_can_come_back_in_float(tmp_path: Path, bundles: dict[str, Bundle]) -> None:
    with speed_up(), StandIn(tmp_path / "hub", "t0ken", float_outputs=True) as hub:
        client = Client(hub.config())
        target = compiled(client, bundles["w8a8"].aimet, "--quantize_io")
        scores = np.concatenate(outputs(client, target, {"x": images()})["output"])

    assert target.output_spec[None][0].dtype == "uint8"
    assert scores.dtype == np.float32
    assert psnr(onnxruntime_outputs(bundles["w8a8"].qdq, images()), scores) > 35


def test_channels_can_be_put_last(client: Client, tmp_path: Path) -> None:
    shape = [1, 3, 4, 5]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "graph", values[:1], values[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "relu.onnx"
    )
    options = "--force_channel_last_input x --output_names z --force_channel_last_output z"
    target = compiled(client, tmp_path / "relu.onnx", options)
    x = np.random.default_rng(0).normal(size=(1, 4, 5, 3)).astype(np.float32)

    (z,) = outputs(client, target, {"x": [x]})["z"]

    assert [spec.shape for spec in (*target.input_spec[None], *target.output_spec[None])] == [(1, 4, 5, 3)] * 2
    np.testing.assert_array_equal(z, np.maximum(x, 0))


@pytest.mark.parametrize(
    ("runtime", "model_type", "suffix"),
    [
        ("qnn_dlc", SourceModelType.QNN_DLC, ".dlc"),
        ("qnn_context_binary", SourceModelType.QNN_CONTEXT_BINARY, ".bin"),
        ("tflite", SourceModelType.TFLITE, ".tflite"),
        ("onnx", SourceModelType.ONNX, ".onnx.zip"),
        ("precompiled_qnn_onnx", SourceModelType.ONNX, ".onnx.zip"),
    ],
)
def test_runtimes(
    client: Client, bundles: dict[str, Bundle], tmp_path: Path, runtime: str, model_type: SourceModelType, suffix: str
) -> None:
    target = compiled(client, bundles["w8a8"].aimet, f"--target_runtime {runtime}")
    file = Path(target.download(str(tmp_path)))

    assert target.model_type == model_type
    assert file.name.endswith(suffix)
    again = client.upload_model(file) if runtime == "onnx" else target  # what was downloaded can be used as a model
    np.testing.assert_array_equal(
        outputs(client, again, {"x": images()})["output"], outputs(client, target, {"x": images()})["output"]
    )


def broken(bundle: Bundle, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The bundle with other encodings."""
    encodings = json.loads((bundle.aimet / "model.encodings").read_text())
    change(encodings)
    copy = folder / "broken.aimet"
    copy.mkdir()
    (copy / "model.encodings").write_text(json.dumps(encodings))
    (copy / "model.onnx").write_bytes((bundle.aimet / "model.onnx").read_bytes())
    return copy


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda e: e.update(version="0.6.1"), "version 0.6.1"),
        (lambda e: e["activation_encodings"][0].update(name="nothing"), "does not have: nothing"),
        (lambda e: e["param_encodings"][0].update(scale=[1.0, 1.0], offset=[-128, -128]), "6 channels"),
        (lambda e: e["activation_encodings"][0].pop("scale"), "encodings file is invalid"),
        (lambda e: e["activation_encodings"][0].update(bw=4), "8 or 16 bits"),
    ],
)
def test_wrong_encodings_fail_the_compile_job(
    client: Client, bundles: dict[str, Bundle], tmp_path: Path, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    path = broken(bundles["w8a8"], tmp_path, change)

    assert reason in failure(client.submit_compile_job(path, S24))


def test_what_is_not_a_model_fails_the_compile_job(client: Client, bundles: dict[str, Bundle], tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a model")
    deep = archive(tmp_path / "deep.aimet.zip", {"a.aimet/b/model.onnx": b"", "a.aimet/model.encodings": b"{}"})
    config = client.config
    made = public_rest_api.create_and_upload_model(
        config, str(deep), SourceModelType.AIMET_ONNX.value, is_directory=True
    )

    assert "ONNX model is invalid" in failure(client.submit_compile_job(tmp_path / "text.onnx", S24))
    assert "exactly one directory" in failure(client.submit_compile_job(client.get_model(made.id), S24))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--output_names a,b", "2 names for 1 outputs"),
        ("--force_channel_last_output image", "names image"),
        ("--force_channel_last_output output", "no channels to put last"),
        ("--quantize_io --quantize_io_type uint16", "has 8 bits"),
    ],
)
def test_options_that_do_not_fit_fail_the_compile_job(
    client: Client, bundles: dict[str, Bundle], options: str, reason: str
) -> None:
    assert reason in failure(client.submit_compile_job(bundles["w8a8"].aimet, S24, options=options))


@pytest.mark.parametrize(
    ("options", "detail"),
    [
        ("--no_such_option 1", "Unrecognized compile option '--no_such_option'"),
        ("--output_names", "needs a value"),
        ("--target_runtime toaster", "Unknown target runtime 'toaster'"),
    ],
)
def test_unknown_options_are_refused(
    hub: StandIn, client: Client, bundles: dict[str, Bundle], options: str, detail: str
) -> None:
    with pytest.raises(UserError, match=detail):
        client.submit_compile_job(bundles["w8a8"].aimet, S24, options=options)
    assert hub.jobs() == []


def test_input_specs_have_to_agree_with_the_model(client: Client, bundles: dict[str, Bundle]) -> None:
    model = client.upload_model(bundles["w8a8"].aimet)

    assert "needs a fixed shape" in failure(client.submit_compile_job(model, S24, input_specs={"x": (1, 3, 9, 9)}))
    assert "inputs are ['x']" in failure(client.submit_compile_job(model, S24, input_specs={"y": (1, 3, 8, 8)}))
    assert client.submit_compile_job(model, S24, input_specs={"x": (1, 3, 8, 8)}).wait(20).success


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"y": [np.zeros((1, 3, 8, 8), np.float32)]}, "the model's inputs are x"),
        ({"x": [np.zeros((1, 8, 8, 3), np.float32)]}, r"has shape (1, 8, 8, 3)"),
        ({"x": [np.zeros((1, 3, 8, 8), np.int16)]}, "has type int16"),
    ],
)
def test_wrong_inputs_fail_the_inference_job(
    client: Client, bundles: dict[str, Bundle], inputs: dict[str, list[Array]], reason: str
) -> None:
    target = compiled(client, bundles["w8a8"].aimet, "--quantize_io")
    job = client.submit_inference_job(target, S24, inputs=inputs)

    assert reason in failure(job)
    assert job.download_profile() == {}
    assert job.download_output_data() is None


def test_uploaded_weights_may_lie_in_a_file_of_their_own(
    client: Client, bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    bundle, folder = bundles["w8a8"], tmp_path / "external.aimet"
    folder.mkdir()
    model = onnx.load(bundle.aimet / "model.onnx")
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.data", size_threshold=64)
    (folder / "model.encodings").write_bytes((bundle.aimet / "model.encodings").read_bytes())
    assert (folder / "model.data").stat().st_size > 1000

    inside, outside = (
        outputs(client, compiled(client, path), {"x": images()})["output"] for path in (bundle.aimet, folder)
    )

    np.testing.assert_array_equal(inside, outside)


def test_what_is_not_an_archive_fails_the_job() -> None:
    with pytest.raises(runner.JobFailure, match="cannot be read"):
        compiler.open_source(b"no zip", compiler.AIMET, is_directory=True)
