"""NumPy's operations against PyTorch's, where that is installed; the whole of networks is compared in test_graph.py."""

import numpy as np
import pytest

from wdkd.numpy_network import OPERATIONS, run, softmax

torch = pytest.importorskip("torch")


def images(*shape):
    return np.random.default_rng(0).normal(size=shape)


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def nhwc(x):
    return x.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution(stride):
    x, kernel = images(2, 9, 10, 3), images(3, 3, 3, 5)
    expected = torch.nn.functional.conv2d(nchw(x), torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()), stride=stride, padding=1)
    found = OPERATIONS["conv"](x, kernel, strides=[stride, stride], padding=[[1, 1], [1, 1]])
    np.testing.assert_allclose(found, nhwc(expected), atol=1e-12)


@pytest.mark.parametrize("sides", [(8, 6), (9, 7)])
def test_max_pooling(sides):
    x = images(2, *sides, 3)
    np.testing.assert_array_equal(OPERATIONS["max_pool"](x), nhwc(torch.nn.functional.max_pool2d(nchw(x), 2, ceil_mode=True)))


def test_norms():
    x, scale, bias, mean = images(2, 5, 6, 8), *images(3, 8)
    var = np.abs(images(8)) + 0.1
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in (scale, bias, mean, var)]
    grouped = torch.nn.functional.group_norm(nchw(x), 2, tensors[0], tensors[1], 1e-6)
    np.testing.assert_allclose(OPERATIONS["group_norm"](x, scale, bias, groups=2, epsilon=1e-6), nhwc(grouped), atol=1e-12)
    batched = torch.nn.functional.batch_norm(nchw(x), tensors[2], tensors[3], tensors[0], tensors[1], eps=1e-5)
    np.testing.assert_allclose(OPERATIONS["batch_norm"](x, scale, bias, mean, var, epsilon=1e-5), nhwc(batched), atol=1e-12)


def test_softmax_of_large_logits():
    logits = np.array([[1000.0, 999.0, -1000.0]])
    np.testing.assert_allclose(softmax(logits), torch.softmax(torch.from_numpy(logits), -1).numpy(), atol=1e-15)


def test_values_are_kept_until_they_are_used_again():
    nodes = [
        {"op": "relu", "inputs": ["pixels"], "output": "a", "attributes": {}},
        {"op": "mul", "inputs": ["a", "p"], "output": "b", "attributes": {}},
        {"op": "add", "inputs": ["b", "a"], "output": "c", "attributes": {}},
    ]
    assert run(nodes, {"p": np.array(3.0)}, np.array([-1.0, 2.0])).tolist() == [0.0, 8.0]
