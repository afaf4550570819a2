"""The public API is complete, and costs nothing until it is used."""

import importlib.util
import subprocess
import sys

import pytest

import wdkd


def test_every_name_is_that_of_its_module():
    for module, names in wdkd._MODULES.items():
        for name in names:
            assert getattr(wdkd, name) is getattr(importlib.import_module(f"wdkd.{module}"), name)
    assert set(wdkd.__all__) <= set(dir(wdkd))
    # A module of the same name would take its place as soon as it is imported.
    assert not {name for name in wdkd.__all__ if importlib.util.find_spec(f"wdkd.{name}")}


def test_modules_are_attributes_and_other_names_are_none():
    assert wdkd.losses.hint is wdkd.hint
    with pytest.raises(AttributeError, match="'wdkd' has no attribute 'hnit'"):
        wdkd.hnit  # noqa: B018


def test_importing_it_imports_nothing_else():
    script = "import sys, wdkd; print([name for name in sys.modules if name.startswith(('wdkd.', 'jax', 'numpy'))])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
