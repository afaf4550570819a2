"""A trained network as the content of a file, format by format. Each module that only one of them needs is imported there."""

import io
import json
import zipfile
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from wdkd.config import to_dict
from wdkd.errors import UsageError
from wdkd.exported import GRAPH, METADATA, MODEL, Description
from wdkd.folding import fold
from wdkd.graph import flops, named, record
from wdkd.run_directory import Trained
from wdkd.teacher import inference

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
"""That a StableHLO export runs on."""


def to_onnx(trained: Trained, description: Description) -> bytes:
    """Batch norm folded, NCHW; inputs and outputs as `onnx_graph.to_onnx` says."""
    return onnx_content(trained, description.texts())


def onnx_content(trained: Trained, texts: Mapping[str, str]) -> bytes:
    """The same with any metadata."""
    from wdkd import onnx_graph

    shape = tuple(trained.run.input.image_shape)
    model, variables = fold(trained.model, trained.variables, shape)
    values = {name: np.asarray(leaf) for name, leaf in named(variables).items()}
    return onnx_graph.to_onnx(record(model, variables, shape), values, texts).SerializeToString()


def to_stablehlo(trained: Trained, description: Description) -> bytes:
    """A zip archive of the function pixels (batch, H, W, C) -> (logits, probabilities), its parameters inside, and the description."""
    # What serialises an export is imported by it when it is too late to say so.
    import flatbuffers  # noqa: F401
    from jax import export

    shape = tuple(trained.run.input.image_shape)
    model, variables = fold(trained.model, trained.variables, shape)

    def network(pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = inference(model)(variables, pixels).logits
        return logits, jax.nn.softmax(logits)

    (batch,) = export.symbolic_shape("batch")
    image = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    content = export.export(jax.jit(network), platforms=PLATFORMS)(image).serialize()
    return _archive({MODEL: bytes(content), METADATA: json.dumps(description.texts(), ensure_ascii=False, indent=1).encode()})


def _archive(files: dict[str, bytes]) -> bytes:
    """A zip archive without times, so that the same network is the same file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def to_safetensors(trained: Trained, description: Description) -> bytes:
    """The checkpoint's own arrays under their own names; their use, as `numpy_network.run` takes it, is in the metadata."""
    import safetensors.numpy

    graph = record(trained.model, trained.variables, trained.run.input.image_shape)
    nodes = [{"op": node.op, "inputs": node.inputs, "output": node.output, "attributes": node.attributes} for node in graph.nodes]
    values = {name: np.ascontiguousarray(leaf) for name, leaf in named(trained.variables).items() if name in graph.parameters}
    architecture = json.dumps(to_dict(trained.run.config.model))
    return safetensors.numpy.save(values, {**description.texts(), "architecture": architecture, GRAPH: json.dumps(nodes)})


WRITERS: dict[str, Callable[[Trained, Description], bytes]] = {
    "onnx": to_onnx,
    "stablehlo": to_stablehlo,
    "safetensors": to_safetensors,
}


def write(format: str, trained: Trained, description: Description) -> bytes:
    """The file's content. Raises UsageError where a package that this takes is missing."""
    try:
        return WRITERS[format](trained, description)
    except ModuleNotFoundError as error:
        raise UsageError(f"--format {format} needs the package {(error.name or '').split('.')[0]}; pip install 'wdkd[onnx]'") from error


def forward_flops(trained: Trained) -> int:
    """Of one image, as `graph.flops` counts."""
    return flops(record(trained.model, trained.variables, trained.run.input.image_shape))
