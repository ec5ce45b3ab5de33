"""Write a checkpoint's model and tokenizer as a folder that other libraries load, or all of it as one file."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmexp.contracts import UserError
from lmexp.huggingface.export import write
from lmexp.job.build import build_node, build_task
from lmexp.job.check import check
from lmexp.job.initialize import model_weights
from lmexp.job.plan import Plan
from lmexp.job.restore import merged
from lmexp.job.train import quiet_libraries
from lmexp.run import checkpoint as files
from lmexp.run.directory import disk_errors
from lmexp.tokenizer.tokenizer import Tokenizer

FORMATS = ("hf", "checkpoint")


def export(plan: Plan) -> None:
    """Make `out` of the checkpoint `ckpt`, whole or not at all: a folder, or with `format=checkpoint` one file, however
    many pieces the checkpoint is in. Neither data nor a device is needed."""
    cfg = plan.config
    if int(os.environ.get("RANK", "0")) > 0:
        return  # the first process does it
    quiet_libraries()
    if cfg.format not in FORMATS:
        raise UserError(f"format={cfg.format}; expected {' or '.join(FORMATS)}.")
    if cfg.ckpt is None:
        raise UserError("job=export needs a checkpoint: ckpt=RUN_DIRECTORY or ckpt=FILE.")
    path = files.resolve(str(cfg.ckpt))
    if cfg.format == "checkpoint":
        file = check_new_file(cfg.out)
        whole = files.load(path)
        merged(plan, whole["lmexp"]["config"])  # raises for overrides of what the checkpoint decides
        files.save(whole, file)
        print(f"{path} as one file, {file}.\nUse it: ckpt={file} or init_from={file}")
        return
    out = check_new_folder(cfg.out)
    checkpoint = files.load_model(path)
    model, dtype = model_of(plan, checkpoint, path)
    segments = checkpoint["lmexp"]["config"]["objective"].get("segments", False)
    tokenizer = Tokenizer.from_json(checkpoint["lmexp"]["tokenizer"])
    class_name = _write_beside(out, model, tokenizer, dtype, segments)
    print(
        f"{path}, after step {checkpoint['lmexp']['step']}, as {class_name} in {out}.\n"
        f'Load it: transformers.{class_name}.from_pretrained("{out}"), '
        f'transformers.AutoTokenizer.from_pretrained("{out}")'
    )


def check_new_folder(out: Any) -> Path:
    """The folder that `out` names; `UserError` unless it is yet to be made, or empty."""
    if out is None:
        raise UserError("job=export needs a folder to write: out=FOLDER.")
    path = Path(str(out)).expanduser()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        what = "a file" if path.is_file() else "a folder with files in it"
        raise UserError(f"out={out} is {what}; expected a folder that does not exist yet, or an empty one.")
    return path


def check_new_file(out: Any) -> Path:
    """The file that `out` names; `UserError` if there is something."""
    if out is None:
        raise UserError("job=export format=checkpoint needs a file to write: out=FILE.")
    path = Path(str(out)).expanduser()
    if path.exists():
        raise UserError(f"out={out} is there already; expected a file that does not exist yet.")
    return path


def model_of(plan: Plan, checkpoint: dict[str, Any], path: Path) -> tuple[Any, torch.dtype]:
    """The model of a checkpoint, with its weights or their average, and what they are stored as."""
    saved = checkpoint["lmexp"]["config"]
    cfg = merged(plan, saved)
    tokenizer = Tokenizer.from_json(checkpoint["lmexp"]["tokenizer"])
    model: nn.Module
    classes = checkpoint["lmexp"].get("classes")
    if classes is None:
        model = build_node(cfg, "model").build(tokenizer.vocab_size)
    else:  # with a head of its own
        parts = check(cfg, 1, training=False, classes=classes)
        model = build_task(cfg, parts, tokenizer.vocab_size).model
    weights = model_weights(checkpoint)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"Checkpoint {path} does not belong to the model of its configuration: {reason} Use a checkpoint as it "
            "was saved."
        ) from error
    dtypes = [value.dtype for value in weights.values() if value.is_floating_point()]
    return model.eval(), dtypes[0] if dtypes else torch.float32


def _write_beside(out: Path, model: nn.Module, tokenizer: Tokenizer, dtype: torch.dtype, segments: bool) -> str:
    """Write into a folder beside `out`, which then takes its name; returns their class."""
    with disk_errors(out, "Exporting"):
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
        try:
            class_name = write(beside, model, tokenizer, dtype, segments)
            beside.chmod(0o755)
            os.replace(beside, out)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
    return class_name
