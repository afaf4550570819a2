"""Pixels as another framework's network takes them, and its outputs as logits of the data's classes: against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import edit

from wdkd.config import Config, TeacherInputConfig
from wdkd.errors import UsageError
from wdkd.teacher_input import adapt, check_outputs, class_order, interface, read_names

NAMES = ("ant", "bee", "cat")
PIXELS = np.random.default_rng(0).uniform(size=(2, 6, 4, 3)).astype(np.float32)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def between(image_shape=(6, 4, 3), own_channels=None, own_size=(None, None), **options):
    return interface(TeacherInputConfig(**options), image_shape, NAMES, where="net.onnx", channels=own_channels, size=own_size)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(("value_range", "scale"), [("0-1", 1), ("0-255", 255)])
@pytest.mark.parametrize("channels", ["rgb", "bgr"])
def test_what_the_network_is_given(layout, value_range, scale, channels):
    mean, std = tuple(scale * m for m in MEAN), tuple(scale * s for s in STD)
    found = between(layout=layout, value_range=value_range, channels=channels, mean=mean, std=std).prepare(PIXELS)
    expected = PIXELS.astype(np.float64) * scale
    expected = (expected[..., ::-1] if channels == "bgr" else expected) - np.array(mean)
    expected = expected / np.array(std)
    np.testing.assert_allclose(found, expected.transpose(0, 3, 1, 2) if layout == "nchw" else expected, rtol=1e-5, atol=1e-5)


def test_grey_images_are_repeated_for_a_network_of_colour_images():
    grey = PIXELS[..., :1]
    for made in (between((6, 4, 1), own_channels=3), between((6, 4, 1), mean=MEAN)):
        assert made.channels == 3 and made.shape == (3, 6, 4)
    np.testing.assert_array_equal(between((6, 4, 1), own_channels=3, layout="nhwc").prepare(grey), np.repeat(grey, 3, -1))


def test_resizing_keeps_a_ramp_a_ramp_and_has_a_derivative():
    ramp = np.broadcast_to(np.linspace(0, 1, 8, dtype=np.float32)[None, :, None, None], (1, 8, 8, 1))
    made = between((8, 8, 1), size=(16, 16))
    steps = np.diff(np.asarray(made.prepare(ramp))[0, 0, 2:-2, 0])
    np.testing.assert_allclose(steps, 1 / 14, atol=1e-5)
    assert between((8, 8, 1), size=(4, 4)).prepare(ramp).shape == (1, 1, 4, 4)
    # Bilinear weights of each of the outputs sum to 1.
    gradient = jax.grad(lambda x: made.prepare(x).sum())(jnp.asarray(ramp))
    np.testing.assert_allclose(gradient.sum(), 16 * 16, rtol=1e-5)


def test_the_size_is_the_networks_own_else_what_is_given_else_the_datas():
    assert between(own_size=(9, 9)).shape == (3, 9, 9) == between(own_size=(9, 9), size=(9, 9)).shape
    assert between(size=(5, 7)).size == (5, 7) and between(own_size=(None, 7), size=(5, 7)).size == (5, 7)
    assert between().size == (6, 4)


def test_outputs_become_logits_of_the_datas_classes():
    outputs = np.array([[0.7, 0.1, 0.2], [0.0, 1.0, 0.0]], np.float32)
    np.testing.assert_array_equal(between().logits(outputs), outputs)
    made = between(classes=("cat", "ant", "bee"), outputs="probabilities")
    found = made.logits(outputs)
    np.testing.assert_allclose(found[0], np.log([0.1, 0.2, 0.7]), rtol=1e-6)
    assert np.isfinite(found).all() and np.isfinite(jax.grad(lambda o: made.logits(o).sum())(outputs)).all()
    np.testing.assert_allclose(np.exp(found[1]), [1, 0, 0], atol=1e-6)


def test_the_adapted_network_has_the_exact_input_gradient():
    weights = np.random.default_rng(1).normal(size=(3, 6, 4, 3)).astype(np.float32)
    made = between(mean=MEAN, std=STD, channels="bgr", classes=("cat", "ant", "bee"))
    apply = adapt(lambda variables, x: jnp.einsum("bchw,chwk->bk", x, variables), made)
    assert apply(weights, PIXELS).hidden == {}
    found = jax.grad(lambda x: apply(weights, x).logits[:, 0].sum())(PIXELS)
    # Class ant is output 1; blue is the first channel of the network.
    expected = weights[..., 1].transpose(1, 2, 0)[..., ::-1] / np.array(STD)[::-1]
    np.testing.assert_allclose(found, np.broadcast_to(expected, PIXELS.shape), rtol=1e-4, atol=1e-5)


def test_equal_interfaces_are_described_equally_and_others_not():
    made = [between(), between(), between(mean=(0.5,)), between(classes=NAMES[::-1]), between(size=(9, 9)), between(layout="nhwc")]
    said = [one.describe() for one in made]
    assert said[0] == said[1] and len(set(said)) == 5


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            {"channels": 16, "layout": "nhwc"},
            "net.onnx takes images of 16 channels with --teacher-input.layout nhwc; only 1 and 3 are known",
        ),
        ({"channels": 1}, "net.onnx takes grey images and the data has 3 channels"),
        ({"image_shape": (6, 4, 1), "channels": 1, "mean": MEAN}, "teacher_input.mean has 3 numbers and teacher net.onnx 1 channels"),
        ({"image_shape": (6, 4, 1), "channels": 1, "channels_": "bgr"}, "teacher_input.channels is bgr, but teacher net.onnx takes grey"),
        ({"size": (9, 9), "size_": (8, 8)}, "teacher_input.size is 8×8 and teacher net.onnx takes 9×9 with --teacher-input.layout nchw"),
        ({"classes": ("ant", "bee", "dog")}, "teacher_input.classes lacks 'cat' and has 'dog', which the data has not"),
        ({"classes": ("ant", "bee")}, "teacher_input.classes lacks 'cat'"),
        ({"classes": ("ant", "bee", "cat", "cat")}, "teacher_input.classes has 'cat' more than once"),
        ({"classes": ("names.txt",)}, "teacher_input.classes is 'names.txt', which is no file"),
    ],
)
def test_what_does_not_go_together_is_named(how, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"image_shape": (6, 4, 3), "channels": None, "size": (None, None)}
    options = {name.rstrip("_"): value for name, value in how.items() if name not in given}
    with pytest.raises(UsageError) as caught:
        interface(TeacherInputConfig(**options), class_names=NAMES, where="net.onnx", **given | {n: how[n] for n in given if n in how})
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_class_names_come_from_a_text_file_too(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffcat\r\n\r\n bee \r\nант\r\n".encode())
    assert read_names(str(path)) == ("cat", "bee", "ант")
    assert class_order((str(path),), ("ант", "bee", "cat")) == (2, 1, 0)
    assert class_order((str(path),), ("cat", "bee", "ант")) is None and class_order(None, NAMES) is None
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is no text in UTF-8"):
        read_names(str(path))


@pytest.mark.parametrize(
    ("shape", "words"),
    [((2,), "gives an array of 2 for 2 images"), ((), "gives one number for 2"), ((3, 3), "3×3"), ((2, 4), "has 4 classes and the data 3")],
)
def test_outputs_of_another_shape_are_refused(shape, words):
    check_outputs((2, 3), 2, 3, "net.onnx")
    with pytest.raises(UsageError, match=words):
        check_outputs(shape, 2, 3, "net.onnx")


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ({"mean": (123.675, 116.28, 103.53)}, "teacher_input.mean is 123.675; it must be -1 to 1, in units of the value range 0-1"),
        ({"std": (0.0,)}, "teacher_input.std is 0.0; it must be above 0 to 1"),
        ({"std": (0.2, 0.2)}, "it must be one number, or one for each of 3 channels"),
        ({"mean": (float("nan"),)}, "teacher_input.mean is nan"),
        ({"size": (0, 4)}, "teacher_input.size is 0; it must be at least 1 pixels"),
        ({"classes": ()}, "at least one name or file"),
    ],
)
def test_options_out_of_range_are_refused(edits, words):
    with pytest.raises(UsageError) as caught:
        edit(Config(), {f"teacher_input.{name}": value for name, value in edits.items()}).check()
    assert words in str(caught.value)
    edit(Config(), {"teacher_input.mean": (123.675, 116.28, 103.53), "teacher_input.value_range": "0-255"}).check()
