"""Scripts that `wdkd.isolation` runs, each by its path and apart from the package: they import nothing of it."""
