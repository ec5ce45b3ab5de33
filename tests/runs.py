"""Helpers of tests that make whole runs: small ones, in this process or in one of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from lmexp.job.plan import Plan

ROOT = Path(__file__).resolve().parents[1]

TINY = (
    "data=files",
    "tokenizer=byte",
    "data.block_size=16",
    "data.corpus.by=tail",
    "model.n_layers=2",
    "model.n_heads=2",
    "model.d_model=16",
    "batch_size=8",
    "trainer=cpu",
    "callback.samples.max_new_tokens=4",
)
"""A model that trains in no time."""


def corpus(folder: Path, n_words: int = 3000) -> str:
    """The override that names a small text file, the same every time."""
    path = folder / "corpus.txt"
    words = ("the", "model", "reads", "a", "line", "and", "writes", "another", "one", "of", "them")
    path.write_text(" ".join(words[(i * i + i // 7) % len(words)] for i in range(n_words)), encoding="utf-8")
    return f"data.corpus.path={path}"


def plan(*overrides: str) -> Plan:
    """What `run.py` would make of these overrides."""
    GlobalHydra.instance().clear()
    OmegaConf.register_new_resolver("lmexp_run_id", lambda: "test", replace=True)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=[o for o in overrides if o], return_hydra_config=True)
    choices = {g: o for g, o in cfg.hydra.runtime.choices.items() if not g.startswith("hydra")}
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=False)  # type: ignore[assignment]
    del plain["hydra"]
    config = OmegaConf.create(plain)
    OmegaConf.resolve(config)
    OmegaConf.set_readonly(config, True)
    return Plan(config, choices, list(overrides))


def command(*overrides: str) -> list[str]:
    """The command line of a run in a process of its own."""
    return [sys.executable, str(ROOT / "run.py"), *overrides]


def run(*overrides: str, cwd: Path | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*overrides), capture_output=True, text=True, cwd=cwd, env=environment, timeout=300, **options
    )


def checkpoint(folder: Path | str, name: str = "last.ckpt") -> dict[str, Any]:
    """A run's checkpoint, as anybody may read it."""
    return torch.load(Path(folder) / "checkpoints" / name, weights_only=True)


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the bit, containers and tensors alike."""
    assert type(a) is type(b), f"{where}: {type(a)} and {type(b)}"
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{number}")
    else:
        assert a == b, f"{where}: {a} and {b}"


def pages(folder: Path | str) -> tuple[dict[str, list[tuple[int, Any]]], list[Any]]:
    """What a directory's event files have besides scalars: tag -> (step, value) of texts as strings and of pictures as
    arrays (height, width, 3), and the records of HPARAMS, in the order written."""
    import io

    import numpy as np
    from PIL import Image
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.plugins.hparams import plugin_data_pb2
    from tensorboard.util import tensor_util

    found: dict[str, list[tuple[int, Any]]] = {}
    hparams = []
    for path in sorted(Path(folder).glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                kind = value.metadata.plugin_data.plugin_name
                if kind == "text":
                    text = tensor_util.make_ndarray(value.tensor).flat[0].decode()
                    found.setdefault(value.tag.removesuffix("/text_summary"), []).append((event.step, text))
                elif kind == "images":
                    *_, encoded = tensor_util.make_ndarray(value.tensor)  # width, height, pictures
                    picture = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
                    found.setdefault(value.tag, []).append((event.step, picture))
                elif kind == "hparams":
                    hparams.append(plugin_data_pb2.HParamsPluginData.FromString(value.metadata.plugin_data.content))
    return found, hparams


def scalars(folder: Path | str) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) of everything in a directory's event files, in the order written."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(Path(folder).glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    number = float(tensor_util.make_ndarray(value.tensor))
                    found.setdefault(value.tag, []).append((event.step, number))
    return found
