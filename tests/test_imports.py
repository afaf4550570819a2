"""Imports go one way, and a few libraries have one door each. Held by parsing the source: nothing is imported here."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = (
    {"errors", "wording", "whitening", "numpy_network", "isolation", "isolated", "isolated.read_records", "isolated.inspect_archive"},
    {"files", "archives", "checks", "typed_json", "notes", "interruption", "lock", "grid_file", "parsing"},
    {
        "config",
        "subset",
        "losses",
        "input_gradients",
        "metrics",
        "augment",
        "batches",
        "result",
        "published",
        "cache",
        "arrays",
        "launcher",
        "vary",
        "images",
        "exported",
        "teacher_source",
    },
    {
        *("data", "prepared", "declaration", "decoding", "datasets", "datasets.digits", "models", "state"),
        *("folder", "contents", "datasets.folder", "prepared_folder"),
    },
    {"folding", "graph", "torch_reference", "meeting", "lifeline", "relay", "pool", "ray_pool", "onnx_operators", "onnx_file"},
    {"teacher", "methods", "teacher_input", "onnx_graph", "quantization", "budget"},
    {"steps"},
    {"parallel", "noise", "checkpoint"},
    {"run_directory", "progress", "pace", "resumption", "teacher_cache", "timing"},
    {"latency"},
    {"onnx_teacher", "function_teacher", "outputs_teacher", "teacher_check"},
    {"recording", "teacher_loading"},
    {"evaluate", "verify", "trainer", "export_formats", "predict"},
    {"compact"},
    {"train", "grid"},
    {"watch"},
    {"board"},
    {"benchmark"},
    {"measure", "costs"},
    {"export"},
    {"document", "tables", "settings", "figures", "page_assets"},
    {"collection", "comparison", "page"},
    {"tuning"},
    {"report", "benchmark_report"},
    {"sweep", "command_line"},
    {""},
)
"""Module names below wdkd, lowest layer first; "" is wdkd/__init__.py, the public API."""
LAYER = {module: index for index, layer in enumerate(LAYERS) for module in layer}


def module_name(path):
    parts = path.relative_to(ROOT / "wdkd").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "wdkd").rglob("*.py"))}
SCRIPTS = {f"launch/{path.name}": path for path in sorted((ROOT / "launch").glob("*.py"))}
SOURCES = {(f"wdkd.{name}" if name else "wdkd"): path for name, path in MODULES.items()} | SCRIPTS


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


TREES = {name: parse(path) for name, path in SOURCES.items()}


def imports(tree):
    """(line, dotted name) of every import, wherever it stands; `from a import b` gives a.b. Relative ones start with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, "." * node.level + ".".join(filter(None, (node.module, alias.name)))) for alias in node.names)


def resolve(name, modules):
    """The module of ours that a dotted name is, or is an attribute of, without the leading `wdkd.`."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in modules:
        parts.pop()
    return ".".join(parts)


def own_imports(tree, modules):
    """(line, module of ours) for each import of something of ours."""
    return [(line, resolve(name, modules)) for line, name in imports(tree) if name.split(".")[0] == "wdkd"]


def libraries(tree):
    """(line, the name of the top-level package) for each import."""
    return [(line, name.split(".")[0]) for line, name in imports(tree)]


def says_multi_device(tree):
    """Lines that use pmap or jax.distributed as code: a name, an attribute or an import."""
    lines = []
    for node in ast.walk(tree):
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
        of_jax = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "jax"
        if name == "pmap" or (name == "distributed" and of_jax):
            lines.append(node.lineno)
    return lines + [line for line, name in imports(tree) if "pmap" in name.split(".") or name.startswith("jax.distributed")]


def unpickling_keywords(tree):
    """allow_pickle=anything but False."""
    keywords = [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "allow_pickle"]
    return [node for node in keywords if not (isinstance(node.value, ast.Constant) and node.value.value is False)]


def using(found):
    """Names of the sources where `found(tree)` is not empty."""
    return {name for name, tree in TREES.items() if found(tree)}


# --- the order ----------------------------------------------------------------------------------------------------------


def test_every_module_has_a_layer_and_every_layer_its_modules():
    unlisted = MODULES.keys() - LAYER.keys()
    assert not unlisted, f"put {', '.join(sorted(unlisted))} into a layer of tests/test_imports.py"
    gone = LAYER.keys() - MODULES.keys()
    assert not gone, f"take {', '.join(sorted(gone))} out of the layers of tests/test_imports.py"


def test_no_module_is_in_two_layers():
    assert len(LAYER) == sum(map(len, LAYERS))


@pytest.mark.parametrize("module", sorted(MODULES.keys() & LAYER.keys()))
def test_imports_only_from_lower_layers_or_its_own(module):
    for line, imported in own_imports(TREES[f"wdkd.{module}".rstrip(".")], MODULES):
        where = f"{MODULES[module].relative_to(ROOT)}:{line}"
        assert imported, f"{where} imports the package wdkd itself; import the module that has what it needs"
        assert LAYER[imported] <= LAYER[module], f"{where} imports {imported}, which is in a higher layer"


def test_no_cycles():
    graph = {m: {imported for _, imported in own_imports(TREES[f"wdkd.{m}".rstrip(".")], MODULES)} for m in MODULES}
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(MODULES)


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_imports_scripts_tests_or_relatively(name):
    for line, imported in imports(TREES[name]):
        where = f"{SOURCES[name].relative_to(ROOT)}:{line}"
        assert not imported.startswith("."), f"{where} has a relative import"
        assert imported.split(".")[0] not in {"launch", "tests", "notebooks"}, f"{where} imports {imported}"


# --- one door each ------------------------------------------------------------------------------------------------------


def test_only_parallel_says_pmap_or_jax_distributed():
    assert using(says_multi_device) == {"wdkd.parallel"}


def test_only_checkpoint_imports_orbax():
    assert using(lambda tree: [line for line, package in libraries(tree) if package == "orbax"]) == {"wdkd.checkpoint"}


def test_only_ray_pool_imports_ray():
    assert using(lambda tree: [line for line, package in libraries(tree) if package == "ray"]) == {"wdkd.ray_pool"}


def test_only_the_onnx_teacher_and_its_operators_import_jaxonnxruntime():
    doors = {"wdkd.onnx_teacher", "wdkd.onnx_operators"}
    assert using(lambda tree: [line for line, package in libraries(tree) if package == "jaxonnxruntime"]) == doors


def test_no_tensorflow_outside_of_preparation():
    assert using(lambda tree: [line for line, package in libraries(tree) if package == "tensorflow"]) <= {"launch/prepare_data.py"}


def test_what_is_run_apart_from_the_package_imports_nothing_of_it():
    for name, tree in TREES.items():
        if name == "wdkd.isolation" or name.startswith("wdkd.isolated"):
            assert not own_imports(tree, MODULES), name


def test_array_record_is_parsed_by_a_process_of_its_own_alone():
    assert using(lambda tree: [line for line, package in libraries(tree) if package == "array_record"]) == {"wdkd.isolated.read_records"}


def test_slow_parts_of_scipy_wait_until_they_are_used():
    """They would be a quarter of what every process spends on importing the package."""

    def at_once(tree):
        head = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        return [name for _, name in imports(head) if name.startswith(("scipy.stats", "scipy.optimize"))]

    assert not using(at_once)


def test_nothing_unpickles():
    doors = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    assert not using(lambda tree: [line for line, package in libraries(tree) if package in doors])
    assert not using(unpickling_keywords)


def test_no_utils():
    assert not [path for path in SOURCES.values() if path.stem in {"util", "utils", "helpers", "common", "misc"}]


# --- the checks themselves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import wdkd.losses", ["losses"]),
        ("import wdkd", [""]),
        ("from wdkd import losses, run", ["losses", ""]),
        ("from wdkd.datasets.digits import Digits", ["datasets.digits"]),
        ("from wdkd.datasets import digits", ["datasets.digits"]),
        ("def f():\n    from wdkd.train import run as go", ["train"]),
        ("import jax, numpy as np", []),
    ],
)
def test_own_imports_finds(source, expected):
    assert [module for _, module in own_imports(ast.parse(source), MODULES)] == expected


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("jax.pmap(f)", True),
        ("from jax import pmap", True),
        ("from jax import distributed", True),
        ("import jax.distributed as d", True),
        ("jax.distributed.initialize()", True),
        ("# pmap\n'''jax.distributed, pmap'''\nlax.pmean(x, 'devices')", False),
        ("torch.distributed.barrier()", False),
    ],
)
def test_says_multi_device_finds_code_alone(source, found):
    assert bool(says_multi_device(ast.parse(source))) == found
