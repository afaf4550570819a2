"""A teacher from an ONNX file is the network that was exported, in its outputs and in all derivatives; what is none is said in a line."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("jaxonnxruntime")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from wdkd.config import TeacherInputConfig  # noqa: E402
from wdkd.errors import UsageError  # noqa: E402
from wdkd.input_gradients import worst_case  # noqa: E402
from wdkd.losses import kl_divergence  # noqa: E402
from wdkd.onnx_teacher import read_onnx_teacher  # noqa: E402

CLASSES = ("a", "b", "c")
SHAPE = (8, 8, 3)
IMAGENET = TeacherInputConfig(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def read(path, options=TeacherInputConfig(), image_shape=SHAPE, class_names=CLASSES):  # noqa: B008
    return read_onnx_teacher(str(path), options, image_shape=image_shape, class_names=class_names)


# --- against PyTorch --------------------------------------------------------------------------------------------------------


def networks(torch):
    """{name: small network of 3 classes on 3×8×8}: a ResNet, a VGG-style net with max-pooling, a MobileNet-style net."""
    nn = torch.nn

    class Residual(nn.Module):
        def __init__(self, channels, out, stride):
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(channels, out, 3, stride, 1, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(),
                nn.Conv2d(out, out, 3, 1, 1, bias=False),
                nn.BatchNorm2d(out),
            )
            self.short = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

        def forward(self, x):
            return torch.relu(self.body(x) + self.short(x))

    class Vgg(nn.Module):
        def __init__(self):
            super().__init__()
            block = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)]
            self.features = nn.Sequential(*block, nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
            self.head = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))

        def forward(self, x):
            x = self.features(x)
            # Exported with a dynamic batch, this is Shape, Gather, Concat and Reshape.
            return self.head(x.reshape(x.size(0), -1))

    class SqueezeExcite(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 4, 1), nn.ReLU(), nn.Conv2d(4, channels, 1))

        def forward(self, x):
            return x * nn.functional.hardsigmoid(self.layers(x))

    resnet = [nn.Conv2d(3, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), Residual(6, 8, 2)]
    mobilenet = [nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.Hardswish(), nn.Conv2d(6, 12, 1), nn.BatchNorm2d(12)]
    mobilenet += [nn.ReLU6(), nn.Conv2d(12, 12, 5, 1, 2, groups=12, bias=False), nn.BatchNorm2d(12), nn.Hardswish(), SqueezeExcite(12)]
    return {
        "resnet": nn.Sequential(*resnet, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
        "vgg": Vgg(),
        "mobilenet": nn.Sequential(*mobilenet, nn.Conv2d(12, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
    }


def trained_looking(network, torch):
    """Batch norm with statistics that are not those of its first day."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            size = module.num_features
            module.running_mean.copy_(torch.randn(size, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(size, generator=generator) + 0.5)
            module.weight.data.copy_(torch.randn(size, generator=generator))
            module.bias.data.copy_(torch.randn(size, generator=generator) * 0.2)
    return network.eval()


EXPORTS = {
    "resnet": {"dynamo": False},
    "vgg": {"dynamo": False, "dynamic_axes": {"x": {0: "batch"}, "y": {0: "batch"}}},
    "mobilenet": {"dynamo": False, "dynamic_axes": {"x": {0: "batch"}, "y": {0: "batch"}}},
    "vgg by dynamo": {"dynamo": True},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXPORTS)
def test_outputs_input_gradients_and_the_objectives_gradient_are_pytorchs(name, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    how = dict(EXPORTS[name])
    if how["dynamo"]:
        pytest.importorskip("onnxscript")
        how |= {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "verbose": False}
    torch.manual_seed(0)
    network = trained_looking(networks(torch)[name.split()[0]], torch)
    path = tmp_path / "net.onnx"
    torch.onnx.export(network, (torch.rand(1 if not how["dynamo"] else 2, 3, 8, 8),), path, input_names=["x"], output_names=["y"], **how)
    teacher = read(path, IMAGENET)

    draw = np.random.default_rng(0)
    images = draw.uniform(size=(5, *SHAPE)).astype(np.float32)
    mix, weights = draw.normal(size=(5, 3)).astype(np.float32), draw.normal(size=(192, 3)).astype(np.float32) * 0.1

    @jax.jit
    def ours(variables, weights):
        logits, pull = jax.vjp(lambda x: teacher.apply(variables, x).logits, images)

        def objective(weights):
            def loss(x):
                return kl_divergence(x.reshape(5, -1) @ weights, teacher.apply(variables, x).logits, 4.0)

            return worst_case(loss, images, 0.5)[0]

        return logits, pull(mix)[0], jax.grad(objective)(weights)

    logits, gradient, moved = ours(teacher.variables, weights)

    def theirs(x):
        scaled = (x - torch.tensor(IMAGENET.mean)) / torch.tensor(IMAGENET.std)
        return network(scaled.permute(0, 3, 1, 2))

    x, w = torch.tensor(images, requires_grad=True), torch.tensor(weights, requires_grad=True)
    outputs = theirs(x)
    (expected,) = torch.autograd.grad((outputs * torch.tensor(mix)).sum(), x)
    # PyTorch has no second derivative of these two as they are: the same functions from operators that have one.
    monkeypatch.setattr(torch.nn.functional, "hardsigmoid", lambda x: torch.nn.functional.relu6(x + 3) / 6)
    monkeypatch.setattr(torch.nn.functional, "hardswish", lambda x, inplace: x * torch.nn.functional.relu6(x + 3) / 6)
    again = theirs(x)
    student, soft = (x.reshape(5, -1) @ w / 4).log_softmax(1), (again / 4).softmax(1)
    values = 16 * (soft * (soft.log() - student)).sum(1)
    (inner,) = torch.autograd.grad(values.sum(), x, create_graph=True)
    (values.mean() + 0.5 * inner.flatten(1).norm(dim=1).mean()).backward()

    np.testing.assert_allclose(logits, outputs.detach(), atol=1e-4)
    for found, wanted in ((gradient, expected.numpy()), (moved, w.grad.numpy())):
        assert np.linalg.norm(found - wanted) <= 1e-3 * np.linalg.norm(wanted)
    np.testing.assert_allclose(jax.jit(teacher.apply)(teacher.variables, images[:2]).logits, logits[:2], atol=1e-5)


# --- small files by hand ------------------------------------------------------------------------------------------------------


KERNEL = np.random.default_rng(2).normal(size=(192, 3)).astype(np.float32)


def model_of(nodes, *, shape=("b", 3, 8, 8), constants=None, outputs=(("y", ("b", 3)),), inputs=(), kind=TensorProto.FLOAT, opset=17):
    """A checked model of nodes on an input x and constants."""
    constants = {"w": KERNEL} | (constants or {})
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", kind, shape), *(helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, sides) for name, sides in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items() if name in used],
    )
    domains = {"": opset} | {node.domain: 1 for node in nodes if node.domain}
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(*item) for item in domains.items()], ir_version=10)


def node(operator, inputs, output, **attributes):
    return helper.make_node(operator, inputs.split(), output.split(), **attributes)


LINEAR = [node("Flatten", "x", "f"), node("MatMul", "f w", "y")]


def written(tmp_path, *arguments, **options):
    path = tmp_path / "net.onnx"
    path.write_bytes(model_of(*arguments, **options).SerializeToString())
    return path


def test_variables_are_an_argument_and_the_hash_is_that_of_the_bytes(tmp_path):
    path = written(tmp_path, LINEAR)
    teacher = read(path)
    images = np.random.default_rng(0).uniform(size=(3, *SHAPE)).astype(np.float32)
    flat = images.transpose(0, 3, 1, 2).reshape(3, -1)
    np.testing.assert_allclose(teacher.apply(teacher.variables, images).logits, flat @ KERNEL, rtol=1e-4, atol=1e-5)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, teacher.variables)
    np.testing.assert_allclose(teacher.apply(doubled, images).logits, 2 * flat @ KERNEL, rtol=1e-4, atol=1e-5)
    again = read(path)
    assert again.apply is teacher.apply and again.hash == teacher.hash, "runs of one process share what was compiled"
    other = read(path, dataclasses.replace(TeacherInputConfig(), mean=(0.5,)))
    assert other.read_as != teacher.read_as and other.hash == teacher.hash and other.apply is not teacher.apply
    assert teacher.accuracy is None and teacher.image_shape == SHAPE and teacher.path == str(path)


@pytest.mark.filterwarnings("error:Explicitly requested dtype")
def test_a_batch_of_any_size_whatever_batch_the_file_has(tmp_path):
    images = np.random.default_rng(0).uniform(size=(5, *SHAPE)).astype(np.float32)
    expected = images.transpose(0, 3, 1, 2).reshape(5, -1) @ KERNEL
    shaped = [node("Shape", "x", "s"), node("Gather", "s zero", "n"), node("Concat", "n rest", "to", axis=0)]
    constants = {"zero": np.array([0]), "rest": np.array([-1]), "one": np.array([1, 192])}
    for nodes, batch in (
        (LINEAR, 1),
        (LINEAR, 4),
        ([*shaped, node("Reshape", "x to", "f"), LINEAR[1]], "b"),
        ([node("Reshape", "x one", "f"), LINEAR[1]], 1),
    ):
        teacher = read(written(tmp_path, nodes, shape=(batch, 3, 8, 8), constants=constants, outputs=(("y", (batch, 3)),)))
        for size in (1, 5):
            found = teacher.apply(teacher.variables, images[:size]).logits
            np.testing.assert_allclose(found, expected[:size], rtol=1e-4, atol=1e-5)


def test_a_constant_that_stands_for_the_end_of_an_axis_is_not_wrapped(tmp_path):
    ends = helper.make_node("Constant", [], ["ends"], value_ints=[2**63 - 1])
    nodes = [ends, node("Slice", "x starts ends axes", "r"), node("GlobalAveragePool", "r", "g"), node("Flatten", "g", "y")]
    teacher = read(written(tmp_path, nodes, constants={"starts": np.array([1]), "axes": np.array([2])}))
    images = np.random.default_rng(0).uniform(size=(2, *SHAPE)).astype(np.float32)
    np.testing.assert_allclose(teacher.apply(teacher.variables, images).logits, images[:, 1:].mean((1, 2)), rtol=1e-5)


def test_images_are_resized_to_the_files_own_size_and_layout(tmp_path):
    nodes = [node("ReduceMean", "x axes", "y", keepdims=0)]
    path = written(tmp_path, nodes, shape=("b", 16, 16, 3), constants={"axes": np.array([1, 2])}, opset=18)
    teacher = read(path, TeacherInputConfig(layout="nhwc"))
    images = np.random.default_rng(0).uniform(size=(2, *SHAPE)).astype(np.float32)
    assert "16, 16" in teacher.read_as
    small = jax.image.resize(jnp.asarray(images), (2, 16, 16, 3), "bilinear").mean((1, 2))
    np.testing.assert_allclose(teacher.apply(teacher.variables, images).logits, small, rtol=1e-5)


def test_parameters_beside_the_file_belong_to_it(tmp_path):
    path = tmp_path / "net.onnx"

    def save(kernel):
        model = model_of(LINEAR, constants={"w": kernel})
        onnx.save_model(model, path, save_as_external_data=True, location="net.data", size_threshold=0)
        return read(path)

    first = save(KERNEL)
    np.testing.assert_array_equal(first.variables["w"], KERNEL)
    assert save(2 * KERNEL).hash != first.hash, "though the file itself is the same"
    (tmp_path / "net.data").unlink()
    refused(path, "keeps its parameters in net.data, which is missing; put it beside the file")


def test_of_several_outputs_the_one_with_the_datas_classes_is_taken(tmp_path, capsys):
    nodes = [*LINEAR, node("Slice", "f from to axes", "side")]
    constants = {"from": np.array([0]), "to": np.array([7]), "axes": np.array([1])}
    teacher = read(written(tmp_path, nodes, constants=constants, outputs=(("side", ("b", 7)), ("y", ("b", 3)))))
    assert "has 2 outputs: 'side' (1×7), 'y' (1×3); 'y' is used" in capsys.readouterr().err
    assert teacher.apply(teacher.variables, np.ones((2, *SHAPE), np.float32)).logits.shape == (2, 3)


# --- bad input --------------------------------------------------------------------------------------------------------------


def refused(path, words, *arguments, **options):
    with pytest.raises(UsageError) as caught:
        read(path, *arguments, **options)
    text = str(caught.value)
    assert words in text and text.isprintable() and len(text) < 900, text


MIXED = [node("ReduceMean", "x", "m", axes=[0]), node("Sub", "x m", "z"), node("Flatten", "z", "f"), LINEAR[1]]
BAD = {
    "unsupported": (
        [node("Resize", "x", "a"), node("FusedConv", "a", "b", domain="com.microsoft"), node("Det", "b", "y")],
        {},
        "has operators that cannot be run here: Det, Resize, com.microsoft.FusedConv (opset 17)",
    ),
    "a shape from pixels": (
        [node("ReduceSum", "x", "t"), node("Reshape", "t flat", "u"), node("Cast", "u", "i", to=TensorProto.INT64)]
        + [node("Concat", "i rest", "to", axis=0), node("Reshape", "x to", "f"), node("MatMul", "f w", "y")],
        {"constants": {"flat": np.array([1]), "rest": np.array([-1])}},
        "the operator Reshape has a shape that depends on the pixels",
    ),
    "positions of pixels": (
        [node("NonZero", "x", "i"), node("Cast", "i", "c", to=TensorProto.FLOAT), node("ReduceMean", "c", "y")],
        {},
        "the operator NonZero has a shape that depends on the pixels",
    ),
    "two inputs": (
        [node("Add", "x z", "a"), node("Flatten", "a", "f"), LINEAR[1]],
        {"inputs": [("z", ("b", 3, 8, 8))]},
        "has 2 inputs ('x', 'z'); it must have one, of images",
    ),
    "two outputs that fit": (
        [*LINEAR, node("Neg", "y", "z")],
        {"outputs": (("y", ("b", 3)), ("z", ("b", 3)))},
        "has 2 outputs, of which 2 have one number for each of the data's 3 classes: 'y' (1×3), 'z' (1×3)",
    ),
    "no output that fits": (
        [*LINEAR, node("ReduceMax", "y", "z")],
        {"outputs": (("f", ("b", 192)), ("z", (1, 1)))},
        "has 2 outputs, of which 0 have",
    ),
    "other classes": (
        [node("Flatten", "x", "f"), node("MatMul", "f v", "y")],
        {"constants": {"v": np.ones((192, 5), np.float32)}, "outputs": (("y", ("b", 5)),)},
        "has 5 classes and the data 3",
    ),
    "a map": ([node("Relu", "x", "y")], {"outputs": (("y", ("b", 3, 8, 8)),)}, "gives an array of 1×3×8×8 for 1 images"),
    "integers": (
        [node("Cast", "x", "a", to=TensorProto.FLOAT), node("Flatten", "a", "f"), LINEAR[1]],
        {"kind": TensorProto.UINT8},
        "takes uint8, which has no input gradient",
    ),
    "vectors": ([node("MatMul", "x w", "y")], {"shape": ("b", 192)}, "takes an array of 2 axes; it must take images"),
    "another layout": (LINEAR, {"shape": ("b", 8, 8, 3)}, "takes images of 8 channels with --teacher-input.layout nchw"),
    "another size": (LINEAR, {"shape": ("b", 3, "h", "w"), "image_shape": (9, 9, 3)}, "does not run on one image of 3×9×9"),
    "a batch in its reshape": (
        [node("Reshape", "x four", "f"), LINEAR[1]],
        {"shape": (4, 3, 8, 8), "constants": {"four": np.array([4, 192])}, "outputs": (("y", (4, 3)),)},
        "does not run on one image of 3×8×8",
    ),
    "images that mix": (MIXED, {}, "its images do not stand for themselves"),
    "a huge batch": (LINEAR, {"shape": (1000, 3, 8, 8), "outputs": (("y", (1000, 3)),)}, "has a fixed batch of 1,000 images"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_a_teacher_is_said_in_a_line(name, tmp_path):
    nodes, options, words = BAD[name]
    options = dict(options)
    image_shape = options.pop("image_shape", SHAPE)
    refused(written(tmp_path, nodes, **options), words, image_shape=image_shape)
