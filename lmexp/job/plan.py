"""What is to be run: the composed configuration, frozen, and how the command came to it."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lmexp.contracts import UserError

ADDED = {
    "data.bpe_dropout": 0.0,
    "data.batch_tokens": None,
    "data.corpus.skip_incomplete": True,
    "callback.answers.tokenize": "13a",
}
"""Keys that the configurations of the first runs lack, and the values that mean what these runs did."""


@dataclass(frozen=True)
class Plan:
    """Everything a job needs, as plain data, so that it can be handed to another process."""

    config: DictConfig
    """The whole configuration, resolved and read-only, without Hydra's own part."""

    choices: dict[str, str]
    """Group -> the option chosen in it."""

    overrides: list[str] = field(default_factory=list)
    """The overrides of the command line that this job has."""

    in_sweep: bool = False
    """Whether this is one job of several."""

    @classmethod
    def freeze(cls, composed: DictConfig, run_id: str) -> Plan:
        """Resolve a configuration that Hydra composed, and name the run's directory if `paths.run_dir` does not.

        Raises `UserError` for an interpolation that leads nowhere or a value that is missing.
        """
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        hydra_cfg = HydraConfig.get()
        plain = OmegaConf.create(cast(dict[str, Any], OmegaConf.to_container(composed, resolve=False)))
        in_sweep = hydra_cfg.mode == RunMode.MULTIRUN
        overrides = list(hydra_cfg.overrides.task)
        choices = choices_of(hydra_cfg)
        if plain.paths.run_dir is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "Processes that something else starts (torchrun) must agree on the run's directory: set paths.run_dir, "
                "on a disk that all machines see."
            )
        if plain.paths.run_dir is None:
            if in_sweep:  # of another sweeper than ours, which names the directory
                plain.paths.run_dir = str(Path(hydra_cfg.sweep.dir) / f"{hydra_cfg.job.num}_{slug(overrides)}")
            else:
                name = choices.get("experiment") or choices["task"]
                plain.paths.run_dir = str(Path(plain.paths.log_dir) / name / run_id)
        return cls.of(plain, choices, overrides, in_sweep)

    @classmethod
    def of(cls, cfg: DictConfig, choices: dict[str, str], overrides: list[str], in_sweep: bool) -> Plan:
        """Resolve `cfg` in place and make it read-only."""
        try:
            OmegaConf.resolve(cfg)
        except OmegaConfBaseException as error:
            raise UserError(f"The configuration cannot be resolved: {str(error).splitlines()[0]}") from error
        OmegaConf.set_readonly(cfg, True)
        return cls(cfg, choices, overrides, in_sweep)

    @property
    def yaml(self) -> str:
        """The resolved configuration as YAML."""
        return OmegaConf.to_yaml(self.config)

    def to_json(self) -> str:
        """As JSON, for `from_json` in another process."""
        content = {
            "config": OmegaConf.to_container(self.config),
            "choices": self.choices,
            "overrides": self.overrides,
            "in_sweep": self.in_sweep,
        }
        return json.dumps(content)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """What `to_json` wrote."""
        content: dict[str, Any] = json.loads(text)
        config = OmegaConf.create(content.pop("config"))
        OmegaConf.set_readonly(config, True)
        return cls(config=config, **content)


def choices_of(hydra_cfg: Any) -> dict[str, str]:
    """Group -> the option chosen in it, of Hydra's own part of a configuration."""
    return {group: option for group, option in hydra_cfg.runtime.choices.items() if not group.startswith("hydra")}


def slug(overrides: list[str]) -> str:
    """Overrides as a file name: what differs between the jobs of a sweep, readable in TensorBoard."""
    told = [o.lstrip("+~") for o in overrides if not o.startswith(("paths.", "hydra."))]
    return re.sub(r"[^\w.=,+-]+", "-", ",".join(told))[:120] or "job"
