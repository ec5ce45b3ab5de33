"""`--help` is ours: what there is to run and to change, with examples."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_help_lists_every_option_and_root_key() -> None:
    done = subprocess.run(
        [sys.executable, "run.py", "--help"], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    for path in sorted((ROOT / "conf").glob("*/*.yaml")):
        if path.stem != "base":
            assert f"\n  {path.stem} " in done.stdout, path
    for line in (ROOT / "conf" / "config.yaml").read_text().splitlines():
        if line[:1].isalpha() and "#" in line:
            assert f"\n  {line.split(':')[0]}:" in done.stdout
    for example in ("experiment=pretrain", "-m experiment=pretrain", "job=evaluate", "job=generate", "resume=auto"):
        assert example in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 150


def test_help_may_be_piped_into_head() -> None:
    done = subprocess.run(
        f"{sys.executable} run.py --help | head -1", shell=True, capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.stdout.startswith("usage:")
    assert "BrokenPipe" not in done.stderr
