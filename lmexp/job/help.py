"""`run.py --help`: what there is to run and to change, read from the comments of conf/ without any library."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_EXAMPLES = """\
usage: python run.py [experiment=NAME] [group=OPTION ...] [key=value ...] [-m] [--cfg job]

examples
  python run.py experiment=pretrain                          train, offline, on the embedded data
  python run.py experiment=pretrain optimizer.lr=0.01        change a value
  python run.py experiment=pretrain model=gpt data=files data.corpus.path=my.txt
                                                             change the parts
  python run.py experiment=pretrain paths.run_dir=logs/mine resume=auto
                                                             go on with a run that was stopped, or start it
  python run.py -m experiment=pretrain optimizer.lr=0.01,0.03 seeds=3
                                                             every combination, a run each, three seeds of it
  python run.py -m experiment=pretrain sweep=tpe 'optimizer.lr=tag(log,interval(1e-3,1e-1))'
                                                             search
  python run.py job=evaluate ckpt=logs/mine job.split=test   measure a run
  python run.py job=generate ckpt=logs/mine 'job.prompt="The function returns"'
                                                             write with it
  python run.py experiment=pretrain --cfg job                show the whole configuration and stop
  tensorboard --logdir logs                                  look at all runs
"""

_ORDER = ("experiment", "job", "data", "tokenizer", "model", "objective", "task", "optimizer", "schedule", "trainer")


def wants_help(arguments: Sequence[str]) -> bool:
    """Whether the command line asks for this page."""
    return any(argument in ("-h", "--help") for argument in arguments)


def print_help(conf: Path) -> None:
    """Print examples, the options of every group with their first comment, and the keys of the root."""
    lines = _page(conf)
    with suppress(BrokenPipeError):  # the reader, head say, has seen enough
        print("\n".join(lines), flush=True)
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more on its way out


def _page(conf: Path) -> list[str]:
    page = [_EXAMPLES]
    groups = sorted({p.parent.name for p in conf.glob("*/*.yaml")})  # not those of Hydra itself
    for group in [*(g for g in _ORDER if g in groups), *(g for g in groups if g not in _ORDER)]:
        options = [(p.stem, _about(p)) for p in sorted((conf / group).glob("*.yaml")) if p.stem != "base"]
        page.append(f"{group}=")
        width = max(len(name) for name, _ in options)
        for name, about in options:
            page.append(f"  {name:<{width}}  {about}"[:150])
        page.append("")
    page.append("keys of the root (those of a group: --cfg job)")
    for line in (conf / "config.yaml").read_text(encoding="utf-8").splitlines():
        if line[:1].isalpha() and "#" in line:
            key, about = line.split("#", 1)
            page.append(f"  {key.strip():<24}{about.strip()}")
    page.append(
        "\nexit codes: 0 done, 2 a mistake in what was asked, 75 stopped by a signal with a checkpoint saved, 1 else"
    )
    return page


def _about(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line.lstrip("# ") for line in lines[:3] if line.startswith("#") and "@package" not in line]
    return comments[0] if comments else ""
