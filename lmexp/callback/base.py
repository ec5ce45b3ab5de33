"""Callbacks that know the run they serve."""

from __future__ import annotations

from lightning.pytorch import Callback

from lmexp.run.session import Session


class RunCallback(Callback):
    """The training job sets `session` before the fit."""

    session: Session
