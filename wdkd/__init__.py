"""wdkd: few-data distillation of image classifiers in functional JAX. The public API on one screen.

A module is imported when something of it is first used: what needs no JAX, as running an exported network, does not wait for it.
"""

import importlib
from typing import Any

_MODULES = {
    "config": (
        "STUDENTS",
        "TEACHERS",
        "AugmentConfig",
        "CacheConfig",
        "Config",
        "DataConfig",
        "MethodConfig",
        "ModelConfig",
        "OptimizerConfig",
        "TeacherInputConfig",
        "TrainConfig",
    ),
    "data": (
        "Dataset",
        "Split",
        "few_shot_split",
        "load_dataset",
    ),
    "errors": ("UsageError",),
    "evaluate": (
        "evaluate_checkpoint",
        "evaluate_network",
    ),
    "export": ("export_run",),
    "exported": (
        "Exported",
        "read_exported",
    ),
    "grid": (
        "Grid",
        "expand",
    ),
    "input_gradients": (
        "WorstCaseAux",
        "dual_norm",
        "value_and_input_gradient",
        "worst_case",
    ),
    "losses": (
        "activation_boundary",
        "cross_entropy",
        "hint",
        "kl_divergence",
        "logit_distance",
        "logit_mse",
    ),
    "methods": (
        "METHODS",
        "Stage",
        "create_stages",
    ),
    "models": (
        "Outputs",
        "create_model",
    ),
    "result": (
        "Evaluation",
        "Result",
        "read_result",
    ),
    "run_directory": (
        "read_teacher",
        "read_trained",
    ),
    "subset": ("few_shot_indices",),
    "sweep": ("run_sweep",),
    "teacher": ("Teacher",),
    "train": ("run",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"wdkd.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'wdkd' has no attribute {name!r}")
    return getattr(importlib.import_module(f"wdkd.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
