"""wdkd: few-data distillation of image classifiers in functional JAX. The public API on one screen."""

from wdkd.config import (
    STUDENTS,
    TEACHERS,
    AugmentConfig,
    CacheConfig,
    Config,
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    TeacherInputConfig,
    TrainConfig,
)
from wdkd.data import Dataset, Split, few_shot_split, load_dataset
from wdkd.errors import UsageError
from wdkd.evaluate import evaluate_checkpoint, evaluate_network
from wdkd.grid import Grid, expand
from wdkd.input_gradients import WorstCaseAux, dual_norm, value_and_input_gradient, worst_case
from wdkd.losses import activation_boundary, cross_entropy, hint, kl_divergence, logit_distance, logit_mse
from wdkd.methods import METHODS, Stage, create_stages
from wdkd.models import Outputs, create_model
from wdkd.result import Evaluation, Result, read_result
from wdkd.run_directory import read_teacher, read_trained
from wdkd.subset import few_shot_indices
from wdkd.sweep import run_sweep
from wdkd.teacher import Teacher
from wdkd.train import run

__all__ = [
    "METHODS",
    "STUDENTS",
    "TEACHERS",
    "AugmentConfig",
    "CacheConfig",
    "Config",
    "DataConfig",
    "Dataset",
    "Evaluation",
    "Grid",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Outputs",
    "Result",
    "Split",
    "Stage",
    "Teacher",
    "TeacherInputConfig",
    "TrainConfig",
    "UsageError",
    "WorstCaseAux",
    "activation_boundary",
    "create_model",
    "create_stages",
    "cross_entropy",
    "dual_norm",
    "evaluate_checkpoint",
    "evaluate_network",
    "expand",
    "few_shot_indices",
    "few_shot_split",
    "hint",
    "kl_divergence",
    "load_dataset",
    "logit_distance",
    "logit_mse",
    "read_result",
    "read_teacher",
    "read_trained",
    "run",
    "run_sweep",
    "value_and_input_gradient",
    "worst_case",
]
