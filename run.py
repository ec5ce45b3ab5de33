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

    from lmexp.job.errors import INTERRUPTED, exit_code_of_errors
    from lmexp.job.launch import launch
    from lmexp.job.plan import Plan
    from lmexp.run.directory import new_run_id

    run_id = new_run_id()  # one for this command: the jobs of a sweep share its directory
    OmegaConf.register_new_resolver("lmexp_run_id", lambda: run_id)

    failed: list[int] = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def run(cfg: DictConfig) -> float | None:
        try:
            with exit_code_of_errors():  # here already: Hydra would add a line of its own to each error
                return launch(Plan.freeze(cfg, run_id, sys.argv))
        except SystemExit as end:
            if not {"-m", "--multirun"} & set(sys.argv) or end.code == INTERRUPTED:
                raise
            failed.append(int(end.code or 0))  # the other jobs of a sweep go on
            return float("nan")

    with exit_code_of_errors(CONF):
        run()
    if failed:
        print(f"{len(failed)} of the sweep's jobs failed; each said why above.", file=sys.stderr)
        sys.exit(max(failed))


if __name__ == "__main__":
    main()
