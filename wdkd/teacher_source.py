"""What a teacher is given as, told from its name alone: a run, a shipped name, an ONNX file, Python code, or a file of outputs."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Literal

from wdkd.config import Config, TeacherInputConfig, differences
from wdkd.errors import UsageError, unknown
from wdkd.wording import shown

SHIPPED = Path(__file__).parents[1] / "results" / "teachers"
"""Of a checkout: the runs whose names stand for them."""
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
ENDINGS = {".onnx": "onnx", ".npz": "outputs", ".csv": "outputs"}
TO_EXPORT = (".pt", ".pth", ".ckpt", ".h5", ".keras", ".pb", ".tflite", ".pkl", ".joblib", ".safetensors", ".bin", ".mlmodel")
"""Endings of other frameworks' files."""
FORMS = "a run's directory, an .onnx file, module:function, or outputs in an .npz or .csv"

Kind = Literal["run", "onnx", "function", "outputs"]


@dataclasses.dataclass(frozen=True)
class Source:
    """What kind of teacher it is, and where: an absolute path, or module:function."""

    kind: Kind
    location: str

    @property
    def exists(self) -> bool:
        """Whether there is something of this kind at that place; of code nothing is known until it is imported."""
        return self.kind == "function" or (os.path.isdir if self.kind == "run" else os.path.isfile)(self.location)


def shipped_names() -> list[str]:
    """The names that stand for teachers of the checkout, sorted."""
    return sorted(path.name for path in SHIPPED.glob("*") if (path / "config.json").exists())


def find_source(teacher: str) -> Source:
    """What `teacher` stands for. A directory of that path comes before a shipped name.

    Raises:
      UsageError: if it is a name that nothing has, or a file of another kind.
    """
    path = Path(teacher)
    if os.path.isdir(teacher):  # Of Path.is_dir, a name that is too long raises OSError.
        return Source("run", str(path.absolute()))
    if path.suffix.lower() in ENDINGS:
        return Source(ENDINGS[path.suffix.lower()], str(path.absolute()))
    if FUNCTION.fullmatch(teacher):
        return Source("function", teacher)
    if path.suffix.lower() in TO_EXPORT:
        raise UsageError(f"teacher {shown(teacher, 300)} is another framework's file; export the network to ONNX and give the .onnx file")
    if os.path.isfile(teacher):
        raise UsageError(f"teacher {shown(teacher, 300)} is a file of no kind that is known; give {FORMS}")
    if len(path.parts) == 1 and path.parts[0] == teacher:
        names = shipped_names()
        if teacher not in names:
            raise UsageError(f"{unknown('teacher', teacher, names)}; or give {FORMS}")
        return Source("run", str(SHIPPED / teacher))
    return Source("run", str(path.absolute()))


def check_source(config: Config, *, needs_hidden: bool) -> Source:
    """The source of a config's teacher. Raises UsageError for what this kind of teacher cannot do, before any of it is read.

    `needs_hidden`: whether the method looks at hidden features.
    """
    source = find_source(config.teacher)
    method = config.method
    if source.kind != "run" and needs_hidden:
        raise UsageError(
            f"method {method.name!r} matches hidden features, and of teacher {shown(config.teacher, 200)} the outputs alone are known; "
            "use --method.name kd, wdkd or sobolev, or the directory of a run as teacher"
        )
    if source.kind == "outputs":
        _check_outputs_alone(config)
    taken = {"run": (), "outputs": ("classes",)}.get(source.kind)
    if taken is not None:
        default = dataclasses.replace(TeacherInputConfig(), **{name: getattr(config.teacher_input, name) for name in taken})
        if changed := differences(default, config.teacher_input, "teacher_input."):
            option = changed[0].partition(":")[0]
            what = "a run of wdkd, which knows its input itself" if source.kind == "run" else "a file of outputs, which takes no images"
            raise UsageError(f"{option} is given, but teacher {shown(config.teacher, 200)} is {what}; leave it out")
    return source


def _check_outputs_alone(config: Config) -> None:
    what = f"teacher {shown(config.teacher, 200)} is a file of outputs, one row for each image as it is"
    if config.method.name == "sobolev":
        raise UsageError(f"{what}: it has no input Jacobian for method 'sobolev' to match; use --method.name kd or wdkd")
    if config.method.boundary_radius > 0:
        raise UsageError(
            f"{what}; method.boundary_radius is {config.method.boundary_radius}, and where images would move to nothing is known: "
            "use --method.boundary-radius 0"
        )
    if config.augment.name != "none":
        raise UsageError(f"{what}; augment.name is {config.augment.name!r}, and of other views nothing is known: use --augment.name none")
