"""A teacher from an ONNX file, as a JAX function: its input gradient is exact, and its parameters are arguments."""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
from jaxonnxruntime.call_onnx import call_onnx_model
from jaxonnxruntime.config_class import jaxort_only_allow_initializers_as_static_args as static_initializers_only

from wdkd.config import TeacherInputConfig
from wdkd.errors import UsageError
from wdkd.latency import Timed
from wdkd.notes import note
from wdkd.onnx_file import File, first_line, read_onnx
from wdkd.onnx_operators import STATIC, missing
from wdkd.teacher import Teacher
from wdkd.teacher_input import adapt, check_outputs, interface
from wdkd.wording import shown

FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16}
TOLERANCE = 1e-3
"""Most difference from onnxruntime's outputs, as a share of the largest of them: rounding in float32 is far below it."""

Network = Callable[[Any, jax.Array], jax.Array]


def read_onnx_teacher(
    path: str, options: TeacherInputConfig, *, image_shape: tuple[int, ...], class_names: Sequence[str], given: str | None = None
) -> Teacher:
    """The network of an ONNX file as a teacher of the data's classes for images of its shape (H, W, C).

    The same outputs as onnxruntime's on the same images are made sure of. Equal files and options give the same functions, so that
    the runs of a process share their compiled programs.

    Args:
      given: the path as it is told to the user; None: `path`.

    Raises:
      UsageError: if the file is missing, damaged, too large or no ONNX, has operators that cannot be run (all are named), shapes that
        depend on pixels, several inputs, or no output of one number per class.
    """
    file = read_onnx(Path(path))
    built = _build(_Hashed(file), options, tuple(image_shape), tuple(class_names))
    return dataclasses.replace(built, path=given or path)


@dataclasses.dataclass(frozen=True, eq=False)
class _Hashed:
    """A file as a key of a cache: equal where the bytes are."""

    file: File

    def __hash__(self) -> int:
        return hash(self.file.hash)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and self.file.hash == other.file.hash


@functools.lru_cache(maxsize=8)
def _build(hashed: _Hashed, options: TeacherInputConfig, image_shape: tuple[int, ...], class_names: tuple[str, ...]) -> Teacher:
    file = hashed.file
    where = shown(file.path.name)
    channels, size = _own_size(_image_input(file.model, where)[0], options)
    between = interface(options, image_shape, class_names, where=where, channels=channels, size=size)
    network, variables = _network(hashed, between.shape, len(class_names), options.outputs)
    return Teacher(
        apply=adapt(network, between),
        variables=variables,
        classes=len(class_names),
        image_shape=image_shape,
        path=str(file.path),
        hash=file.hash,
        accuracy=None,
        read_as=between.describe(),
    )


@functools.lru_cache(maxsize=4)
def _network(hashed: _Hashed, shape: tuple[int, ...], classes: int, kind: str) -> tuple[Network, Any]:
    """(function (variables, images (B, *shape)) -> outputs (B, classes), its variables)."""
    file = hashed.file
    where = shown(file.path.name)
    network, variables, shapes = convert(file, shape, where)
    output = _choose_output(shapes, classes, kind, where)
    found = list(shapes.values())[output]
    check_outputs(found, 1, classes, where)
    one = functools.partial(_output, network, output, _image_input(file.model, where)[1])
    _compare(file, one, variables, shape, output)
    # One image at a time, mapped: so the batch may have any size, whatever batch the file was exported with.
    return jax.vmap(lambda variables, image: one(variables, image[None])[0], in_axes=(None, 0)), variables


def single_image_case(path: str, options: TeacherInputConfig, image_shape: tuple[int, ...]) -> tuple[int, Timed | None]:
    """(bytes of the file and what belongs to it, how one image is given to it; None where it takes several at a time alone)."""
    file = read_onnx(Path(path))
    where = shown(file.path.name)
    sides, dtype = _image_input(file.model, where)
    channels, size = _own_size(sides, options)
    own = interface(dataclasses.replace(options, classes=None), image_shape, (), where=where, channels=channels, size=size)
    fixed = (sides[0] or 1) > 1
    return file.size, None if fixed else Timed(str(file.path), _inputs(file.model)[0].name, (1, *own.shape), np.dtype(dtype))


def _output(network: Callable[..., list[jax.Array]], output: int, dtype: Any, variables: Any, x: jax.Array) -> jax.Array:
    with _in_32_bits():
        return network(variables, [x.astype(dtype)])[output]


@contextlib.contextmanager
def _in_32_bits() -> Iterator[None]:
    """The library asks for indices of 64 bits, and JAX warns every user that they have 32; see `_constants_to_initializers`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Explicitly requested dtype int64")
        yield


# --- inputs and outputs -----------------------------------------------------------------------------------------------------


def _inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    initialized = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in initialized]


def _named(values: Sequence[Any]) -> str:
    return ", ".join(repr(shown(value.name)) for value in values)


def _image_input(model: onnx.ModelProto, where: str) -> tuple[list[int | None], Any]:
    """(sides of the input, None where the file leaves them open; its type) of a model with one input of images."""
    inputs = _inputs(model)
    if len(inputs) != 1:
        raise UsageError(f"teacher {where} has {len(inputs)} inputs ({_named(inputs) or 'none'}); it must have one, of images")
    tensor = inputs[0].type.tensor_type
    if tensor.elem_type not in FLOATS:
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        raise UsageError(f"teacher {where} takes {kind}, which has no input gradient; export it with an input of float32")
    sides = [dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in tensor.shape.dim]
    if len(sides) != 4:
        raise UsageError(f"teacher {where} takes an array of {len(sides)} axes; it must take images, (batch, channels, height, width)")
    return sides, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)


def _own_size(sides: list[int | None], options: TeacherInputConfig) -> tuple[int | None, tuple[int | None, int | None]]:
    _, *rest = sides
    return (rest[2], (rest[0], rest[1])) if options.layout == "nhwc" else (rest[0], (rest[1], rest[2]))


def _choose_output(shapes: dict[str, tuple[int, ...]], classes: int, kind: str, where: str) -> int:
    """The number of the output with one number per class; of several, that whose name is the `kind` of outputs that is read.

    Raises:
      UsageError: where none has one number per class, or several have and none is called so.
    """
    fitting = [index for index, shape in enumerate(shapes.values()) if shape == (1, classes)]
    called = [index for index in fitting if list(shapes)[index] == kind]
    fitting = called if len(fitting) > 1 and called else fitting
    described = ", ".join(f"{shown(name)!r} ({'×'.join(map(str, shape))})" for name, shape in shapes.items())
    if len(shapes) > 1 and len(fitting) != 1:
        raise UsageError(
            f"teacher {where} has {len(shapes)} outputs, of which {len(fitting)} have one number for each of the data's {classes} classes: "
            f"{described}; export it with one output, or call the one to take {kind!r}"
        )
    if len(shapes) > 1:
        note(f"teacher {where} has {len(shapes)} outputs: {described}; {shown(list(shapes)[fitting[0]])!r} is used")
        return fitting[0]
    return 0


# --- the function -----------------------------------------------------------------------------------------------------------


def convert(file: File, image_shape: tuple[int, ...], where: str) -> tuple[Callable[..., list[jax.Array]], Any, dict[str, tuple[int, ...]]]:
    """(function (variables, [one image with its batch axis]) -> outputs, its variables, the outputs' shapes by name).

    Raises:
      UsageError: for operators that cannot be run, or a shape that depends on pixels.
    """
    model = onnx.ModelProto()
    model.CopyFrom(file.model)
    # Whatever batch the file was exported with: one image is traced. For the batch of a file that holds it fixed see `_compare`.
    _inputs(model)[0].type.tensor_type.shape.dim[0].dim_value = 1
    _constants_to_initializers(model)
    _refuse_unsupported(model, where)
    _refuse_dynamic_shapes(model, where)
    sample = np.zeros((1, *image_shape), onnx.helper.tensor_dtype_to_np_dtype(_inputs(model)[0].type.tensor_type.elem_type))
    try:
        with static_initializers_only(False), _in_32_bits():
            network, variables = call_onnx_model(model, [jnp.asarray(sample)])
            found = jax.eval_shape(network, variables, [sample])
    except Exception as error:  # Of anything that the library, JAX or NumPy has to say about a graph.
        why = shown(first_line(error), 200)
        size = "×".join(map(str, image_shape))
        raise UsageError(
            f"teacher {where} does not run on one image of {size} ({why}); "
            "check --teacher-input.layout and size, or export it with a dynamic batch"
        ) from error
    names = [value.name for value in model.graph.output]
    host = {name: np.asarray(value) for name, value in variables.items()}
    return network, host, {name: tuple(value.shape) for name, value in zip(names, found, strict=True)}


def _constants_to_initializers(model: onnx.ModelProto) -> None:
    """Constant nodes become initializers, so that they are among the variables; whole numbers are brought into 32 bits.

    JAX computes with 32 bits and wraps what is larger, as the 2^63 - 1 that stands for the end of an axis.
    """
    kept, added = [], []
    for node in model.graph.node:
        value = next((a for a in node.attribute if node.op_type == "Constant" and a.name.startswith("value")), None)
        if value is None or value.name in ("value_string", "value_strings"):
            kept.append(node)
            continue
        content = onnx.helper.get_attribute_value(value)
        types = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
        array = onnx.numpy_helper.to_array(content) if value.name == "value" else np.asarray(content, types[value.name])
        added.append(onnx.numpy_helper.from_array(array, node.output[0]))
    del model.graph.node[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend(added)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT64:
            array = onnx.numpy_helper.to_array(tensor)
            limits = np.iinfo(np.int32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array.clip(limits.min, limits.max).astype(np.int64), tensor.name))


def _refuse_unsupported(model: onnx.ModelProto, where: str) -> None:
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if names := missing(model.graph.node, opset):
        raise UsageError(
            f"teacher {where} has operators that cannot be run here: {shown(', '.join(names), 500)} (opset {opset}); "
            "export it without them, or record its outputs and give those as --teacher outputs.npz"
        )


def _refuse_dynamic_shapes(model: onnx.ModelProto, where: str) -> None:
    """Raises UsageError where an input that shapes depend on is computed from pixels: it would be that of another image."""
    from_pixels = {value.name for value in _inputs(model)}
    for node in model.graph.node:
        tainted = [name in from_pixels for name in node.input]
        if any(tainted[i] for i in STATIC.get(node.op_type, ()) if i < len(tainted)):
            name = f" {shown(node.name)!r}" if node.name else ""
            raise UsageError(
                f"teacher {where}: the operator {node.op_type}{name} has a shape that depends on the pixels, which does not resolve ahead "
                "of the images; export it without, or record its outputs and give those as --teacher outputs.npz"
            )
        if any(tainted) and node.op_type != "Shape":
            from_pixels.update(node.output)


def _compare(file: File, one: Network, variables: Any, shape: tuple[int, ...], output: int) -> None:
    """Raises UsageError unless onnxruntime gives the same outputs on random images of this shape.

    A batch that the file holds fixed is filled; each image's outputs must be those of the image alone.
    """
    where = shown(file.path.name)
    declared = _inputs(file.model)[0].type.tensor_type
    batch = declared.shape.dim[0].dim_value or 2
    if batch > 256:
        raise UsageError(f"teacher {where} has a fixed batch of {batch:,} images; export it with a dynamic batch")
    images = np.random.default_rng(0).normal(size=(batch, *shape)).astype(onnx.helper.tensor_dtype_to_np_dtype(declared.elem_type))
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(str(file.path), options, providers=["CPUExecutionProvider"])
        expected = np.asarray(session.run(None, {session.get_inputs()[0].name: images})[output], np.float32)
    except Exception as error:  # onnxruntime's own errors have no common class.
        raise UsageError(f"teacher {where} does not run in onnxruntime ({shown(first_line(error), 200)}); export it again") from error
    # Operator by operator, as they were compiled when the shapes were found.
    rows = [np.asarray(one(variables, images[i : i + 1]), np.float32) for i in range(min(batch, 2))]
    found, expected = np.concatenate(rows), expected[: len(rows)]
    half = 8 if declared.elem_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16) else 1
    difference = np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-6) if found.shape == expected.shape else np.inf
    if not difference <= TOLERANCE * half:
        raise UsageError(
            f"teacher {where}: its outputs differ by {difference:.2g} of their size from onnxruntime's, so an operator of it is not run "
            "correctly here or its images do not stand for themselves; record its outputs and give those as --teacher outputs.npz"
        )
