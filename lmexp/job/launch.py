"""From a plan to running processes: one here, or one for each device, which live and die together.

Every rank starts from the frozen configuration, never from the command line, so that a job of several devices is
one job also in a sweep, and no state is left to the next. Ranks find one another by the variables that `torchrun`
sets too (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); started by it, this process is one of them.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from lmexp.contracts import UserError
from lmexp.job.errors import ERROR_FILE, INTERRUPTED, USER_ERROR, ChildFailed, exit_code_of_errors
from lmexp.job.plan import Plan

_LEASH = "LMEXP_LEASH"
"""File descriptor of a pipe whose other end the launching process holds: when it ends, so do its ranks."""

_GRACE_S = 10.0

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def launch(plan: Plan) -> float | None:
    """Run the job; returns its metric for sweepers.

    Raises what the job raises, or `ChildFailed` where it ran in processes of its own, which have said why.
    """
    if "LOCAL_RANK" in os.environ:  # started by torchrun or the like
        return run_here(plan)
    count = _device_count(plan)
    if count == 1 and not plan.in_sweep:
        return run_here(plan)
    return _run_in_processes(plan, count)


def run_here(plan: Plan) -> float | None:
    """Run the job in this process."""
    _limit_threads(plan)
    _keep_freed_memory()
    from hydra.utils import get_method

    return get_method(plan.config.job._target_)(plan)


def _device_count(plan: Plan) -> int:
    devices = plan.config.trainer.devices
    if devices == "auto":
        if plan.config.trainer.accelerator not in ("cuda", "auto"):
            return 1
        import torch

        return max(1, torch.cuda.device_count())
    if not isinstance(devices, int) or isinstance(devices, bool) or devices < 1:
        raise UserError(f"trainer.devices={devices}; expected a number of at least 1, or auto.")
    return devices


def _limit_threads(plan: Plan) -> None:
    """Set the CPU threads of this process."""
    threads = plan.config.trainer.threads
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise UserError(f"trainer.threads={threads}; expected a number of at least 1, or null.")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if threads is None and local > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, _cores() // local)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        if "torch" in sys.modules:  # it read the variable when it was imported
            sys.modules["torch"].set_num_threads(threads)


def _keep_freed_memory() -> None:
    """Let the C library of Linux keep what is freed for the next step, which needs as much.

    By default it gives large blocks back to the kernel, which clears each page anew when it is touched: a tenth of the
    time of a small model's step. Blocks above 32 MiB are still given back. Other C libraries, and one that the
    environment has settings for, are left alone.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_in_processes(plan: Plan, count: int) -> float | None:
    with tempfile.TemporaryDirectory(prefix="lmexp-") as folder:
        plan_file, result_file = Path(folder, "plan.json"), Path(folder, "result.json")
        plan_file.write_text(plan.to_json(), encoding="utf-8")
        command = [sys.executable, "-m", "lmexp.job.launch", str(plan_file), str(result_file)]
        read_end, write_end = os.pipe()
        ranks: list[subprocess.Popen[bytes]] = []
        port = _free_port()
        try:
            for rank in range(count):
                environment = {**os.environ, _LEASH: str(read_end), **_rank_variables(rank, count, port)}
                environment[ERROR_FILE] = str(Path(folder, f"error-{rank}"))
                stdin = None if rank == 0 else subprocess.DEVNULL
                # a session of its own: the terminal's Ctrl-C comes to this process alone, which hands it on once
                ranks.append(
                    subprocess.Popen(
                        command, env=environment, pass_fds=(read_end,), stdin=stdin, start_new_session=True
                    )
                )
            code = _wait(ranks)
        finally:
            for process in ranks:
                process.kill()
            for process in ranks:
                process.wait()
            os.close(read_end)
            os.close(write_end)
        if code:
            killed = [f"{rank} by signal {-p.returncode}" for rank, p in enumerate(ranks) if p.returncode < 0]
            if killed and code == 1:
                print(f"Error: a process was ended from outside (rank {', '.join(killed)}).", file=sys.stderr)
            if ranks[0].returncode != code:  # the first had nothing to say about it
                said = [p.read_text(encoding="utf-8") for p in sorted(Path(folder).glob("error-*"))]
                print("".join(said[:1]), end="", file=sys.stderr)
            raise ChildFailed(code)
        return json.loads(result_file.read_text())["metric"]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _rank_variables(rank: int, count: int, port: int) -> dict[str, str]:
    if count == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all; signals are handed on, and once one has failed the others are ended. Returns the exit code."""

    def hand_on(number: int, frame: Any) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    in_main = threading.current_thread() is threading.main_thread()
    old = {s: signal.signal(s, hand_on) for s in (signal.SIGTERM, signal.SIGINT)} if in_main else {}
    try:
        failed_at: float | None = None
        while any(process.poll() is None for process in ranks):
            if failed_at is None and any(process.poll() for process in ranks):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > _GRACE_S:
                for process in ranks:
                    process.kill()
            time.sleep(0.05)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    codes = [process.returncode for process in ranks]
    wrong = [code for code in codes if code]
    if not wrong:
        return 0
    if USER_ERROR in wrong:
        return USER_ERROR
    return INTERRUPTED if set(wrong) == {INTERRUPTED} else 1


def _follow_the_launcher() -> None:
    """End this process at once when the one that launched it is gone, however that ended."""
    handle = os.environ.pop(_LEASH, None)
    if handle is None:
        return

    def wait() -> None:
        os.read(int(handle), 1)  # nothing is ever written: it returns when the other end closes
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="leash").start()


def main(plan_file: str, result_file: str) -> None:
    """What a rank runs: the plan of a file; rank 0 writes the metric to another."""
    _follow_the_launcher()
    code = 0
    try:
        with exit_code_of_errors():
            metric = run_here(Plan.from_json(Path(plan_file).read_text(encoding="utf-8")))
            if os.environ.get("RANK", "0") == "0":
                Path(result_file).write_text(json.dumps({"metric": metric}), encoding="utf-8")
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    # all is written and closed. At once: the threads of the process group may outlive the interpreter, and abort
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
