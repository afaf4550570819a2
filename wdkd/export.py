"""A finished run's network as one file for another runtime, compared with the checkpoint on the test images before it is there."""

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np

from wdkd.cache import temporary_beside
from wdkd.config import to_dict
from wdkd.costs import Row, costs, row_of_network, row_of_teacher
from wdkd.data import Split, few_shot_split, load_dataset
from wdkd.errors import UsageError
from wdkd.export_formats import write
from wdkd.exported import BATCH, VERSION, Description, Exported, Format, input_in_words, pixels, read_exported
from wdkd.files import write_file, write_json, writing
from wdkd.latency import Cost
from wdkd.models import parameter_count
from wdkd.numpy_network import softmax
from wdkd.progress import track
from wdkd.result import read_result
from wdkd.run_directory import Trained, read_trained
from wdkd.teacher import inference
from wdkd.wording import shown

TOLERANCE = 1e-5
"""Largest difference of a logit from the checkpoint's; where logits are above 1, times the largest. Both are computed in float32: of a
student with group norm and logits up to 14, flax was seen to be 1.8e-5 off what float64 gives, and onnxruntime 0.8e-5."""
LAYOUTS: dict[str, str] = {"onnx": "NCHW", "stablehlo": "NHWC", "safetensors": "NHWC"}
"""ONNX has convolutions in NCHW alone, and runtimes for phones expect it; the others keep the network's own."""
NUMPY_IMAGES = 256
"""Test images that a safetensors file, whose arrays are the checkpoint's bit for bit, is computed on with NumPy."""


@dataclasses.dataclass(frozen=True)
class Verified:
    """What a written file gave on test images, beside the checkpoint on the same."""

    file: str
    images: int
    accuracy: float
    checkpoint_accuracy: float
    max_difference: float
    """Of any logit from the checkpoint's."""
    largest_logit: float
    """Of the checkpoint, whatever its sign: rounding is in proportion to it."""
    changed: int
    """Images that are called something else than by the checkpoint."""

    def line(self) -> str:
        """All of it."""
        return (
            f"{self.file}: accuracy {self.accuracy:.2%} on {self.images:,} test images, checkpoint {self.checkpoint_accuracy:.2%}; "
            f"{self.changed:,} called otherwise; largest difference of a logit {self.max_difference:.1e}, where they are up to "
            f"{self.largest_logit:.1f}"
        )


@dataclasses.dataclass(frozen=True)
class Report:
    """What was written and what it costs, as in the JSON file beside it."""

    run: str
    format: Format
    verified: list[Verified]
    costs: list[Cost]


def export_run(
    directory: str | os.PathLike,
    format: Format,
    out: str | os.PathLike | None = None,
    *,
    int8: bool = False,
    teacher: str | None = None,
    data_dir: str | None = None,
    show: bool = True,
) -> Report:
    """Writes the network of the finished run `directory` to the file `out`, and the report to `out`.json.

    Args:
      out: None: student.onnx, .stablehlo or .safetensors in the run's directory.
      int8: also write a quantised model, student.int8.onnx beside student.onnx.
      teacher: what is in the table of costs too, in any form that training takes; None: the run's teacher, if it is still there.
      data_dir: where TFDS keeps the data here; None: the stored one, else $TFDS_DATA_DIR.

    Raises:
      UsageError: if the run is not finished or damaged, a package is missing, one of the files is there already or cannot be written, or
        what was written does not say what the checkpoint says; then none of them is there.
    """
    directory = Path(directory)
    out = Path(out) if out is not None else directory / f"student.{format}"
    small = out.with_name(f"{out.stem}.int8{out.suffix}") if int8 else None
    _check_request(format, [out, report_of(out), *([small] if small else [])], small)
    trained = read_finished(directory)
    beside = row_of_teacher(trained.run, teacher, read_result(directory / "result.json").teacher_accuracy)
    split = finished_split(trained, directory, data_dir)
    with writing(out), temporary_beside(out.absolute()) as folder:
        logits = checkpoint_logits(trained, split.evaluation_images, show=show)
        described = describe_network(trained, split, logits, format)
        written = {out: write_file(folder / out.name, write(format, trained, described))}
        verified = [
            compare(read_exported(written[out]), out, split, logits, limit=NUMPY_IMAGES if format == "safetensors" else None, show=show)
        ]
        _check_difference(verified[0])
        if small:
            written[small] = write_file(folder / small.name, quantized(written[out].read_bytes(), split, described))
            verified.append(compare(read_exported(written[small]), small, split, logits, show=show))
        rows = [_row(trained, *of) for of in zip(("student", "student int8"), written.values(), verified, strict=False)]
        report = Report(str(directory), format, verified, costs([*rows, *([beside] if beside else [])], show=show))
        for final, path in written.items():
            os.replace(path, final)
        write_json(report_of(out), to_dict(report))
    return report


def report_of(out: Path) -> Path:
    """Where the report of an export is."""
    return out.with_name(f"{out.name}.json")


def _row(trained: Trained, name: str, file: Path, verified: Verified) -> Row:
    onnx = file.read_bytes() if file.suffix == ".onnx" else None
    return row_of_network(name, trained, verified.accuracy, file=file, onnx=onnx)


def _check_request(format: Format, paths: list[Path], small: Path | None) -> None:
    if small and format != "onnx":
        raise UsageError(f"--int8 is for --format onnx, which onnxruntime quantises; {format} is written in float32 alone")
    for path in paths:
        if os.path.lexists(path):
            raise UsageError(f"{shown(path, 300)} is there already; give another --out")


def read_finished(directory: Path) -> Trained:
    """The network of a run that has ended. Raises UsageError for any other."""
    trained = read_trained(directory)
    if not (directory / "result.json").exists():
        raise UsageError(f"{shown(directory, 300)} is not finished (no result.json); give the command that trains it again, and it goes on")
    result = read_result(directory / "result.json")
    if result.status == "diverged":
        raise UsageError(f"{shown(directory, 300)} has diverged: {result.reason}; train another")
    if result.parameter_hash != trained.hash:
        why = "".join(f" ({reason})" for reason in trained.passed_over[:1])
        raise UsageError(
            f"{shown(directory / 'result.json', 300)} is not of step {trained.step}, the newest checkpoint that verifies{why}; restore the "
            "last one, or delete result.json and give the command that trains the run again"
        )
    return trained


def finished_split(trained: Trained, directory: Path, data_dir: str | None) -> Split:
    """The run's training images, and the test images to evaluate on. Raises UsageError where the data set has changed."""
    stored = trained.run.config.data
    config = dataclasses.replace(stored, evaluate_on="test", data_dir=data_dir or stored.data_dir)
    config.check()
    split = few_shot_split(load_dataset(config), config, trained.run.config.seed)
    if list(split.image_shape) != trained.run.input.image_shape or list(split.class_names) != trained.run.input.class_names:
        raise UsageError(f"{directory} was trained on other images or classes than {split.name} has; restore that data set")
    return split


def checkpoint_logits(trained: Trained, images: np.ndarray, *, show: bool) -> np.ndarray:
    """What the checkpoint itself says, (n, classes), of images (n, H, W, C) uint8."""
    apply = jax.jit(lambda variables, x: inference(trained.model)(variables, x).logits)
    size = min(BATCH, len(images))
    parts = []
    for start in track(range(0, len(images), size), title="checkpoint", total=-(-len(images) // size), show=show):
        # The last batch as long as the others, for which the program is compiled.
        first = min(start, len(images) - size)
        parts.append(np.asarray(apply(trained.variables, pixels(images[first : first + size])))[start - first :])
    return np.concatenate(parts)


def describe_network(trained: Trained, split: Split, logits: np.ndarray, format: Format) -> Description:
    """What the file says about itself."""
    given, config = trained.run.input, trained.run.config
    return Description(
        version=VERSION,
        class_names=given.class_names,
        input=input_in_words(LAYOUTS[format], given.image_shape),
        layout=LAYOUTS[format],
        image_shape=given.image_shape,
        mean=given.mean,
        std=given.std,
        precision="float32",
        model=config.model.words,
        parameters=parameter_count(trained.variables["params"]),
        parameter_hash=trained.hash,
        dataset=config.data.name,
        accuracy=float((logits.argmax(-1) == split.evaluation_labels).mean()),
        test_images=len(logits),
    )


def compare(exported: Exported, final: Path, split: Split, reference: np.ndarray, *, limit: int | None = None, show: bool) -> Verified:
    """What a written file says of the test images, or the first `limit` of them, beside what the checkpoint said."""
    images, labels, reference = split.evaluation_images[:limit], split.evaluation_labels[:limit], reference[:limit]
    batches = track(range(0, len(images), BATCH), title=final.name, total=-(-len(images) // BATCH), show=show)
    logits, probabilities = (
        np.concatenate(part) for part in zip(*(exported(pixels(images[start : start + BATCH])) for start in batches), strict=True)
    )
    if np.abs(probabilities - softmax(logits.astype(np.float64))).max() > TOLERANCE:
        raise UsageError(f"{final.name}: the probabilities that it gives are not those of its logits; it was not written")
    return Verified(
        file=final.name,
        images=len(images),
        accuracy=float((logits.argmax(-1) == labels).mean()),
        checkpoint_accuracy=float((reference.argmax(-1) == labels).mean()),
        max_difference=float(np.abs(logits - reference).max()),
        largest_logit=float(np.abs(reference).max()),
        changed=int((logits.argmax(-1) != reference.argmax(-1)).sum()),
    )


def _check_difference(verified: Verified) -> None:
    most = TOLERANCE * max(1.0, verified.largest_logit)
    if not verified.max_difference <= most:
        raise UsageError(
            f"{verified.file}: its logits differ from the checkpoint's by up to {verified.max_difference:.1e}, more than {most:.1e}, so "
            "it was not written; another version of the packages of wdkd[onnx] may compute it right"
        )


def quantized(model: bytes, split: Split, described: Description) -> bytes:
    """The ONNX model in int8, its ranges measured on the run's training images."""
    from wdkd.quantization import quantize

    images = pixels(split.train_images).transpose(0, 3, 1, 2)
    return quantize(model, images, dataclasses.replace(described, precision="int8").texts())
