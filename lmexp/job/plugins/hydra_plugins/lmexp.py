"""Hydra takes plugins of the package hydra_plugins only; `register_plugins` puts the folder above on the path."""

from lmexp.job import sweep


class LmexpSweeper(sweep.LmexpSweeper):
    """`hydra/sweeper=lmexp`."""


class LmexpLauncher(sweep.LmexpLauncher):
    """`hydra/launcher=lmexp`."""
