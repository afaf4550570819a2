"""int8 models say nearly what their float32 models say, whitening included, in standard operators with the same inputs and outputs."""

import numpy as np
import pytest
from test_folding import drawn

from wdkd.exported import session
from wdkd.folding import fold
from wdkd.graph import named, record
from wdkd.models import with_whitening

onnx = pytest.importorskip("onnx")
onnx_graph = pytest.importorskip("wdkd.onnx_graph")
quantization = pytest.importorskip("wdkd.quantization")
SHAPE = (16, 16, 3)


def smooth_images(count):
    """uint8 images whose neighbouring pixels are much alike, as photographs' are."""
    noise = np.random.default_rng(0).normal(size=(count, *SHAPE)).cumsum(1).cumsum(2)
    low, high = noise.min((1, 2, 3), keepdims=True), noise.max((1, 2, 3), keepdims=True)
    return np.rint(255 * (noise - low) / (high - low)).astype(np.uint8)


@pytest.mark.parametrize(("name", "norm"), [("whitened_cnn", "group"), ("whitened_cnn", "batch"), ("resnet8", "batch")])
def test_int8_is_near_float32(name, norm):
    model, variables, _ = drawn(name, norm, SHAPE)
    images = smooth_images(96)
    variables = with_whitening(variables, images, variables["input"])
    folded, fewer = fold(model, variables, SHAPE)
    content = onnx_graph.to_onnx(record(folded, fewer, SHAPE), named(fewer), {"a": "b"}).SerializeToString()
    pixels = (images.astype(np.float32) / 255).transpose(0, 3, 1, 2)
    made = quantization.quantize(content, pixels[:64], {"a": "c"})
    before, after = (session(each).run(["logits"], {"pixels": pixels[64:]})[0] for each in (content, made))
    # A random network's, whose weights are no smoother than noise; with whitening in 8 bits it is as large as the logits themselves.
    assert np.square(after - before).mean() < 0.1 * before.var(0).mean()
    quantized = onnx.load_from_string(made)
    assert {use.domain for use in quantized.opset_import if use.domain not in ("", "ai.onnx")} <= {"com.microsoft"}
    assert {node.domain for node in quantized.graph.node} <= {"", "ai.onnx"}
    kernels = [tensor.data_type for tensor in quantized.graph.initializer if len(tensor.dims) == 4 and tensor.dims[0] != 1]
    assert kernels.count(onnx.TensorProto.FLOAT) == 1 and kernels.count(onnx.TensorProto.INT8) == len(kernels) - 1 > 0
    assert {entry.key: entry.value for entry in quantized.metadata_props} == {"a": "c"}
