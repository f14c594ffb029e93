"""Projects that use the package: each trains a model and writes a checkpoint."""
