"""What the tests share: tiny configs on the embedded digits, one trained teacher, and compiled steps kept between calls of pytest."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Before JAX is imported; several tests compare bits.
# Nearly all the time of these tests goes into compiling, and LLVM's optimisation is a third of that.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

import dataclasses
import functools
import importlib.util
import shutil
import signal
from pathlib import Path

import jax
import pytest
from tiny_set import prepare_tiny

from wdkd import parallel
from wdkd.config import AugmentConfig, Config, DataConfig, MethodConfig, ModelConfig, TrainConfig
from wdkd.train import run

# The same program is then read back, bit for bit.
parallel.enable_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    # Below nohup, or in the background of a script, these come ignored, and would be in the processes that are sent them here.
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


def pytest_collection_modifyitems(items):
    """The notebook with a teacher from PyTorch is skipped, visibly, where the extras that it needs are not installed."""
    missing = [name for name in ("torch", "onnxscript", "jaxonnxruntime", "onnxruntime") if importlib.util.find_spec(name) is None]
    for item in items:
        if missing and item.path.name == "your_teacher.ipynb":
            item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(missing)}"))


def edit(config, edits):
    """The config with each dotted option of `edits`, as {"method.name": "kd"}, replaced."""
    for path, value in edits.items():
        part, _, rest = path.partition(".")
        config = dataclasses.replace(config, **{part: edit(getattr(config, part), {rest: value}) if rest else value})
    return config


def tiny(**edits):
    """Seconds of work: digits, 20 images per class, width 4, batch 20, every step logged. Edits are data__n_per_class=5 and so on."""
    base = Config(
        data=DataConfig(n_per_class=20),
        model=ModelConfig(width=4),
        method=MethodConfig(name="ce"),
        augment=AugmentConfig(padding=1, flip=False),
        train=TrainConfig(steps=6, batch_size=20, log_every=1, checkpoint_every=2),
    )
    return edit(base, {name.replace("__", "."): value for name, value in edits.items()})


METHODS = {
    "ce": {},
    "kd": {"augment__name": "matching", "optimizer__ema_decay": 0.5},
    "fitnet": {"method__pretrain_fraction": 0.5},
    "ab": {"method__pretrain_fraction": 0.5, "method__epsilon": 0.05},
    "wdkd": {"augment__name": "flip_crop"},
    "sobolev": {},
}
"""A tiny run of each method; fitnet and ab change from their first to their second stage after 3 of 6 steps."""


def method_config(name, teacher, **edits):
    """The config of the tiny run of a method."""
    return tiny(method__name=name, teacher=None if name == "ce" else str(teacher), **METHODS[name] | edits)


def files(directory):
    """{relative path: content} of every file below a directory, and None for every folder."""
    directory = Path(directory)
    return {str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in sorted(directory.rglob("*"))}


@pytest.fixture(scope="session")
def teacher_run(tmp_path_factory):
    """(directory, result) of a teacher that is better than chance: batch norm, as the presets' teachers."""
    directory = tmp_path_factory.mktemp("shared") / "teacher"
    return directory, run(tiny(model__norm="batch", optimizer__learning_rate=0.02, train__steps=24), directory, show_progress=False)


@pytest.fixture(scope="session")
def finished_run(teacher_run, tmp_path_factory):
    """A function: method -> (directory, result) of its tiny run, trained when it is first asked for, without interruption."""
    directory = tmp_path_factory.mktemp("finished")

    @functools.cache
    def train(method):
        return directory / method, run(method_config(method, teacher_run[0]), directory / method, show_progress=False)

    return train


@pytest.fixture(scope="module")
def tiny_original(tmp_path_factory):
    """The data directory of a tiny set that no test may change."""
    data_dir = tmp_path_factory.mktemp("original")
    prepare_tiny(data_dir)
    return data_dir


@pytest.fixture
def tiny_folder(tiny_original, tmp_path, monkeypatch):
    """The folder of a copy of the tiny set that the test may damage."""
    monkeypatch.setenv("WDKD_CACHE_DIR", str(tmp_path / "cache"))
    shutil.copytree(tiny_original, tmp_path / "tfds")
    return tmp_path / "tfds" / "tiny_set" / "1.2.3"
