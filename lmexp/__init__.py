"""lmexp: language-model experiments with Lightning, Hydra and TensorBoard."""

__version__ = "0.1.0"
