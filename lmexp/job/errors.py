"""How a command ends: users' mistakes as one clear message, and the exit codes.

0 done; 2 the user's mistake; 75 stopped by a signal with a checkpoint saved; 1 anything else.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmexp.contracts import Interrupted, StorageError, UserError

USER_ERROR = 2
INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again


ERROR_FILE = "LMEXP_ERROR_FILE"
"""Environment variable: where a rank other than the first leaves its error for the process that launched it."""


class ChildFailed(Exception):
    """A process that was started for the job ended with this exit code and has said why."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


@contextmanager
def exit_code_of_errors(conf: Path | None = None) -> Iterator[None]:
    """Turn whatever is raised inside into a message and an exit code; `conf` is where did-you-mean looks."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions as they are, instead of a printed traceback and exit code 1
    try:
        yield
    except UserError as error:
        _say(str(error))
        sys.exit(1 if isinstance(error, StorageError) else USER_ERROR)
    except Interrupted as stop:
        _say(str(stop), title="Stopped")
        sys.exit(INTERRUPTED)
    except ChildFailed as failed:
        sys.exit(failed.code)
    except KeyboardInterrupt:
        _say("Interrupted before there was anything to save.", title="Stopped")
        sys.exit(1)
    except Exception as error:
        message = _of_hydra(error, conf)
        if message is None:
            raise
        _say(message)
        sys.exit(USER_ERROR)


def _say(message: str, title: str = "Error") -> None:
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.flush()
        print(f"{title}: {message}", file=sys.stderr, flush=True)
    elif ERROR_FILE in os.environ:  # every rank finds the same mistake; this one speaks if the first does not
        Path(os.environ[ERROR_FILE]).write_text(f"{title}: {message}\n", encoding="utf-8")


def _of_hydra(error: Exception, conf: Path | None) -> str | None:
    """What is wrong with the command line, if that is what Hydra complains about; None: something else."""
    from hydra.errors import HydraException
    from hydra.errors import MissingConfigException as MissingConfig
    from omegaconf.errors import OmegaConfBaseException

    if conf is not None and "Config group override must be a string" in str(error):
        return "A group was set to null; choose one of its options, which python run.py --help lists."
    if conf is None or not isinstance(error, (HydraException, OmegaConfBaseException)):
        return None  # inside a job it is a bug of ours, whose traceback is wanted
    text = str(error).strip()
    if isinstance(error, MissingConfig) and error.missing_cfg_file is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        options = sorted(p.stem for p in (conf / group).glob("*.yaml") if p.stem != "base") if group else []
        if not group:
            return f"There is no configuration named {name}; expected config, the only root."
        return f"{group}={name}: there is no such option. {_did_you_mean(name, options)}It has {', '.join(options)}."
    unknown = re.match(r"Could not override '([^']+)'", text)
    if unknown:
        key = unknown.group(1).split("@")[0]
        keys = _keys(conf)
        if key in keys:  # of another option of its group
            having = ", ".join(f"{group}={name}" for group, name in sorted(keys[key]))
            return f"{key}: the option chosen for {key.split('.')[0]} has no such key; these have it: {having}."
        return f"{key}: there is no such key or group. {_did_you_mean(key, list(keys))}" + (
            "python run.py --help lists the groups, python run.py --cfg job the keys."
        )
    ambiguous = re.match(r"Ambiguous value for argument '([^']*)'", text)
    if ambiguous:
        key, _, value = ambiguous.group(1).partition("=")
        return (
            f"{key}={value} has commas. In two pairs of quotes it is one text: '{key}=\"{value}\"'; in brackets a "
            f"list: '{key}=[{value}]'; and with -m each value is a job of its own."
        )
    if "mismatched input" in text or "token recognition error" in text or "no viable alternative" in text:
        return (
            f"The command line cannot be read: {' '.join(text.split())} Put values with spaces, commas or signs in two "
            "pairs of quotes: 'job.prompt=\"Hello, world\"'."
        )
    return " ".join(text.split())


def _did_you_mean(wrong: str, known: list[str]) -> str:
    close = difflib.get_close_matches(wrong, known, n=2, cutoff=0.6)
    if not close and "." not in wrong:  # perhaps the last part of a longer key
        close = [k for k in known if k.rpartition(".")[2] == wrong][:2]
    if not close and "." in wrong:
        tails = {k.rpartition(".")[2]: k for k in known}
        near = difflib.get_close_matches(wrong.rpartition(".")[2], list(tails), n=1, cutoff=0.7)
        close = [tails[name] for name in near]
    return f"Did you mean {' or '.join(close)}? " if close else ""


def _keys(conf: Path) -> dict[str, set[tuple[str, str]]]:
    """Every key and group that the files of conf/ know -> the (group, option) that have it."""
    from omegaconf import DictConfig, OmegaConf

    keys: dict[str, set[tuple[str, str]]] = {}

    def walk(node: Any, prefix: str, owner: tuple[str, str]) -> None:
        for key in node:
            name = f"{prefix}{key}"
            if name == "hydra" or key == "defaults":
                continue
            keys.setdefault(name, set()).add(owner)
            child = node._get_node(key)
            if isinstance(child, DictConfig):
                walk(child, f"{name}.", owner)

    walk(OmegaConf.load(conf / "config.yaml"), "", ("", ""))
    for path in sorted(conf.glob("*/*.yaml")):
        group = path.parent.name
        keys.setdefault(group, set())
        is_global = "@package _global_" in path.read_text(encoding="utf-8")
        walk(OmegaConf.load(path), "" if is_global else f"{group}.", (group, path.stem))
    return keys
