"""lmexp's entry: compose the configuration, check it, run the job, return its metric.

`python run.py --help` lists what there is to run and to change.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lmexp.job.help import print_help, wants_help

CONF = Path(__file__).resolve().parent / "conf"


def main() -> None:
    if wants_help(sys.argv[1:]):
        print_help(CONF)
        return
    import hydra
    from omegaconf import DictConfig, OmegaConf

    from lmexp.job.errors import exit_code_of_errors
    from lmexp.job.start import register_plugins, start, with_checkpoint
    from lmexp.run.directory import new_run_id

    run_id = new_run_id()  # one for this command: the jobs of a sweep share its directory
    OmegaConf.register_new_resolver("lmexp_run_id", lambda: run_id)
    register_plugins(sys.argv)
    sys.argv[1:] = with_checkpoint(sys.argv[1:])

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def run(cfg: DictConfig) -> float | None:
        with exit_code_of_errors():  # here already: Hydra would add a line of its own to each error
            return start(cfg, run_id)

    with exit_code_of_errors(CONF):
        run()


if __name__ == "__main__":
    main()
