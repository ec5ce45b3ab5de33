"""The signals that mean: save and end."""

from __future__ import annotations

import signal

SIGNALS = tuple(getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, n))
"""SIGUSR1 is what SLURM is usually told to send some time before the limit."""

TWICE_S = 3.0
"""A signal that comes again so soon is the same one, by another way: a scheduler may tell all processes at once."""
