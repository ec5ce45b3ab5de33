"""From a plan to running processes: one here, or one for each device, which live and die together.

Every rank starts from the frozen configuration, never from the command line, so that a job of several devices is
one job also in a sweep, and no state is left to the next. Ranks find one another by the variables that `torchrun`
sets too (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); started by it, this process is one of them.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmexp.contracts import Diverged, Interrupted, UserError
from lmexp.job.errors import ERROR_FILE, INTERRUPTED, USER_ERROR, ChildFailed, exit_code_of_errors
from lmexp.job.plan import Plan
from lmexp.run.signals import SIGNALS

_LEASH = "LMEXP_LEASH"
"""File descriptor of a pipe whose other end the launching process holds: when it ends, so do its ranks."""

_GRACE_S = 10.0

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h

_MADV_HUGEPAGE = 14  # of mman.h


def launch(plan: Plan) -> float | None:
    """Run the job; returns its metric for sweepers.

    Raises what the job raises, or `ChildFailed` where it ran in processes of its own, which have said why.
    """
    if "LOCAL_RANK" in os.environ:  # started by torchrun or the like
        return run_here(plan)
    count = device_count(plan)
    if count == 1 and not plan.in_sweep:
        return run_here(plan)
    with Ranks(plan, count) as ranks:
        outcome = ranks.wait()
    if outcome.code:
        raise ChildFailed(outcome.code)
    return outcome.metric


def run_here(plan: Plan) -> float | None:
    """Run the job in this process."""
    _limit_threads(plan)
    _keep_freed_memory()
    set_matmul_precision(plan.config.trainer.matmul_precision)
    from hydra.utils import get_method

    return get_method(plan.config.job._target_)(plan)


def device_count(plan: Plan) -> int:
    """Processes that the job needs, one on each device."""
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
        threads = max(1, cores() // local)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        if "torch" in sys.modules:  # it read the variable when it was imported
            sys.modules["torch"].set_num_threads(threads)


def set_matmul_precision(wanted: str) -> None:
    """Say how exactly float32 matrices are multiplied in this process, sums being of float32 in any case.

    On a CPU with units for bf16 (AMX) `medium` takes a third of the time; one without stays at float32.
    """
    if wanted not in ("highest", "high", "medium"):
        raise UserError(f"trainer.matmul_precision={wanted}; expected highest, high or medium.")
    import torch

    if torch.get_float32_matmul_precision() != wanted:
        torch.set_float32_matmul_precision(wanted)


def _keep_freed_memory() -> None:
    """Let the C library of Linux keep what is freed for the next step, which needs as much.

    By default it gives large blocks back to the kernel, which clears each page anew when it is touched: a tenth of the
    time of a small model's step. Blocks above 32 MiB are still given back. Other C libraries, and one that the
    environment has settings for, are left alone.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    _use_huge_pages(libc)


def _use_huge_pages(libc: ctypes.CDLL) -> None:
    """Let the next GiB of the heap be of pages of 2 MiB, where Linux leaves that to programs: a twentieth of the time
    of a small model's step. What of it is never touched takes no memory."""
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.sbrk.argtypes = [ctypes.c_size_t], [ctypes.c_ssize_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mallopt(_M_TOP_PAD, 2**30)
    block = libc.malloc(31 * 2**20)  # more than is free now, so that the heap grows by that GiB
    end = libc.sbrk(0)
    libc.mallopt(_M_TOP_PAD, 2**27)
    if block and end and 0 < end - block < 2**32:  # else it is not from the heap
        first = -(-block // 2**21) * 2**21
        libc.madvise(first, end - first, _MADV_HUGEPAGE)
    libc.free(block)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Outcome:
    """How a job's processes ended."""

    code: int
    """Exit code of all together."""

    metric: float | None = None
    """What the job returned."""

    kind: str = ""
    """diverged, mistake, crash, interrupted, killed; empty for a job that is done."""

    said: str = ""
    """The error."""


class Ranks:
    """The processes of one job, which live and die together; a context."""

    def __init__(
        self, plan: Plan, count: int, environment: dict[str, str] | None = None, output: Path | None = None
    ) -> None:
        """Start them. `environment`: variables besides this process's. `output`: where what they print is appended
        instead of being shown."""
        self._folder = tempfile.TemporaryDirectory(prefix="lmexp-")
        folder = Path(self._folder.name)
        plan_file, self._result_file = folder / "plan.json", folder / "result.json"
        plan_file.write_text(plan.to_json(), encoding="utf-8")
        command = [sys.executable, "-m", "lmexp.job.launch", str(plan_file), str(self._result_file)]
        self._ends = os.pipe()
        self._shown = None if output is None else output.open("ab")
        self.signals: list[int] = []
        """Those that `wait` has handed on."""
        self._failed_at: float | None = None
        self._first_codes: list[int | None] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        try:
            port = _free_port()
            for rank in range(count):
                variables = {**os.environ, **(environment or {}), _LEASH: str(self._ends[0])}
                variables |= {**_rank_variables(rank, count, port), ERROR_FILE: str(folder / f"error-{rank}")}
                # a session of its own: the terminal's Ctrl-C comes to this process alone, which hands it on once
                self.processes.append(
                    subprocess.Popen(
                        command,
                        env=variables,
                        pass_fds=(self._ends[0],),
                        stdin=None if rank == 0 and output is None else subprocess.DEVNULL,
                        stdout=self._shown,
                        stderr=self._shown,
                        start_new_session=True,
                    )
                )
        except BaseException:
            self.close()
            raise

    def send(self, number: int) -> None:
        """A signal to all that are running."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def running(self) -> bool:
        """Whether any runs still. Once one has failed, the others are given some seconds and then ended."""
        if self._failed_at is None and any(process.poll() for process in self.processes):
            self._failed_at = time.monotonic()
            self._first_codes = [process.poll() for process in self.processes]
        if self._failed_at is not None and time.monotonic() - self._failed_at > _GRACE_S:
            for process in self.processes:
                process.kill()
        return any(process.poll() is None for process in self.processes)

    def wait(self) -> Outcome:
        """Wait for all; signals are handed on."""
        in_main = threading.current_thread() is threading.main_thread()
        numbers = SIGNALS if in_main else ()

        def handle(number: int, frame: Any) -> None:
            self.signals.append(number)
            self.send(number)

        old = {number: signal.signal(number, handle) for number in numbers}
        try:
            while self.running():
                time.sleep(0.05)
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
        return self.outcome()

    def tell_of_signal(self) -> None:
        """Tell whoever listens in this process of the signals that `wait` handed on."""
        for number in dict.fromkeys(self.signals):
            listener = signal.getsignal(number)
            if callable(listener) and listener is not signal.default_int_handler:
                listener(number, None)

    def outcome(self) -> Outcome:
        """How they ended; says what none of them could."""
        codes = [process.returncode for process in self.processes]
        code = _code_of(codes)
        told = self._told()
        if not code:
            return Outcome(0, told.get("metric"))
        # those that ended after the first had failed were brought down by it, or by this process
        first = {rank: c for rank, c in enumerate(self._first_codes) if c}
        # nothing but the outside kills so: what failed by then, or was aborted, had lost its peer
        first = {rank: c for rank, c in first.items() if c == -signal.SIGKILL} or first
        killed = [f"{rank} by signal {-c}" for rank, c in first.items() if c < 0]
        killed = killed if len(killed) == len(first) else []
        said = str(told.get("said", ""))
        if killed and code == 1:
            said = f"a process was ended from outside (rank {', '.join(killed)})."
            self._say(f"Error: {said}\n")
            return Outcome(code, kind="killed", said=said)
        if codes[0] != code or not said:  # the first had nothing to say about it
            others = [p.read_text(encoding="utf-8") for p in sorted(Path(self._folder.name).glob("error-*"))]
            self._say("".join(others[:1]))
            said = said or "".join(others[:1])
        kind = told.get("kind") or {USER_ERROR: "mistake", INTERRUPTED: "interrupted"}.get(code, "crash")
        return Outcome(code, kind=kind, said=said or f"exit code {code}")

    def _told(self) -> dict[str, Any]:
        """What the first process wrote at its end; nothing, if it was killed while it did or the disk was full."""
        try:
            told: dict[str, Any] = json.loads(self._result_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return told

    def _say(self, text: str) -> None:
        if self._shown is not None:
            self._shown.write(text.encode())
            self._shown.flush()
        else:
            print(text, end="", file=sys.stderr)

    def close(self) -> None:
        """End what still runs."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        for end in self._ends:
            os.close(end)
        if self._shown is not None:
            self._shown.close()
        self._folder.cleanup()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


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


def _code_of(codes: list[int]) -> int:
    wrong = [code for code in codes if code]
    if not wrong:
        return 0
    if USER_ERROR in wrong:
        return USER_ERROR
    return INTERRUPTED if set(wrong) == {INTERRUPTED} else 1


def _follow_the_launcher(folder: Path) -> None:
    """End this process at once when the one that launched it is gone, however that ended, and take away its folder,
    which it could not."""
    handle = os.environ.pop(_LEASH, None)
    if handle is None:
        return

    def wait() -> None:
        os.read(int(handle), 1)  # nothing is ever written: it returns when the other end closes
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="leash").start()


def main(plan_file: str, result_file: str) -> None:
    """What a rank runs: the plan of a file; rank 0 writes to another the metric, or what went wrong."""
    _follow_the_launcher(Path(plan_file).parent)
    code = 0
    told: dict[str, Any] = {}
    try:
        with exit_code_of_errors():
            try:
                told["metric"] = run_here(Plan.from_json(Path(plan_file).read_text(encoding="utf-8")))
            except BaseException as error:
                told = {"kind": _kind_of(error), "said": f"{error}" or type(error).__name__}
                raise
            finally:
                if os.environ.get("RANK", "0") == "0":
                    with suppress(OSError):  # a full disk: the run's own files say how it ended
                        Path(result_file).write_text(json.dumps(told), encoding="utf-8")
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    # all is written and closed. At once: the threads of the process group may outlive the interpreter, and abort
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _kind_of(error: BaseException) -> str:
    if isinstance(error, Diverged):
        return "diverged"
    if isinstance(error, UserError):
        return "mistake"
    return "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "crash"


if __name__ == "__main__":
    main(*sys.argv[1:])
