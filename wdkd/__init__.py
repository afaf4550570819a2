"""wdkd: few-data distillation of image classifiers in functional JAX."""
