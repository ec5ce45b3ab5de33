"""What a sweep has found: means over seeds with intervals, the best run, comparisons; as table, CSV and pictures."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lmexp.contracts import UserError
from lmexp.job.plan import Plan
from lmexp.job.search import front
from lmexp.run.directory import write_atomically
from lmexp.run.ledger import Entry, Ledger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""The 97.5 % point of Student's t with 1 to 30 degrees of freedom."""


@dataclass(frozen=True)
class Group:
    """The runs of one point of a sweep, which differ in the seed alone."""

    point: dict[str, str]
    values: dict[int, float]
    """Seed -> the metric, of the runs that are done."""

    entries: list[Entry]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values()) if self.values else math.nan

    @property
    def half_width(self) -> float:
        """Of the 95 % interval of the mean, by Student's t; nan for fewer than two runs."""
        return half_width(list(self.values.values()))


def half_width(values: Sequence[float]) -> float:
    """Half the 95 % confidence interval of a mean of independent values, by Student's t."""
    if len(values) < 2:
        return math.nan
    freedom = len(values) - 1
    z = 1.959964
    t = _T_975[freedom - 1] if freedom <= len(_T_975) else z + (z**3 + z) / (4 * freedom)  # Cornish and Fisher
    return t * statistics.stdev(values) / math.sqrt(len(values))


def groups_of(entries: Sequence[Entry], monitor: str, mode: str) -> list[Group]:
    """The points of a sweep, the best mean first, those without any value last."""
    found: dict[tuple[tuple[str, str], ...], list[Entry]] = {}
    for entry in entries:
        point = tuple((key, value) for key, value in entry.point.items() if key != "seed")
        found.setdefault(point, []).append(entry)
    groups = [
        Group(
            dict(point),
            {e.seed: e.metrics[monitor] for e in of if _has(e, [monitor])},
            of,
        )
        for point, of in found.items()
    ]
    sign = 1 if mode == "min" else -1
    return sorted(groups, key=lambda g: (not g.values, sign * g.mean if g.values else 0.0))


def _has(entry: Entry, monitors: Sequence[str]) -> bool:
    """Whether a job is done and has these numbers; nan is none."""
    return entry.status == "done" and not any(math.isnan(entry.metrics.get(name, math.nan)) for name in monitors)


def compared(a: Group, b: Group) -> tuple[float, float, int]:
    """Mean of b - a over the seeds that both have, half its 95 % interval, and their number."""
    shared = sorted(a.values.keys() & b.values.keys())
    differences = [b.values[seed] - a.values[seed] for seed in shared]
    mean = statistics.fmean(differences) if differences else math.nan
    return mean, half_width(differences), len(shared)


def sweep_report(plan: Plan) -> float:
    """The job: report on the sweep of `job.sweep`; returns the best value.

    Raises `UserError` for a directory without a sweep.
    """
    cfg = plan.config
    where = cfg.job.sweep
    if where is None:
        all_sweeps = Path(cfg.paths.log_dir) / "sweeps"
        sweeps = [p.parent for p in all_sweeps.glob("*/sweep.yaml")]
        if not sweeps:
            raise UserError(f"There is no sweep in {all_sweeps}; name one: job.sweep=DIRECTORY.")
        where = max(sweeps, key=lambda p: (p / "sweep.yaml").stat().st_mtime)
    ledger = Ledger(where)
    if not ledger.exists() or not (ledger.sweep_dir / "sweep.yaml").exists():
        raise UserError(f"job.sweep={where} holds no sweep; expected the directory that -m printed (hydra.sweep.dir).")
    asked: Any = OmegaConf.load(ledger.sweep_dir / "sweep.yaml")
    groups = report_on(ledger, list(asked.monitor), list(asked.mode))
    return groups[0].mean if groups else math.nan


def report_on(ledger: Ledger, monitors: Sequence[str], modes: Sequence[str]) -> list[Group]:
    """Print the tables; write report.csv, parallel.png and TensorBoard's page of the sweep. Returns its points."""
    entries = _of_last_call(ledger)
    console = Console(highlight=False, width=None)
    groups = groups_of(entries, monitors[0], modes[0])
    tables = [_table(groups, monitors, modes, len({e.seed for e in entries}) > 1)]
    if len([g for g in groups if len(g.values) > 1]) > 1:
        tables.append(_comparisons(groups, monitors[0]))
    if any(e.status not in ("done", "pruned") for e in entries):
        tables.append(_others(entries))
    for table in tables:
        console.print(table)
    write_atomically(ledger.sweep_dir / "report.csv", _csv(entries, monitors, modes))
    tables_kept = "report.csv"
    (ledger.sweep_dir / "means.csv").unlink(missing_ok=True)
    if len({e.seed for e in entries}) > 1:
        write_atomically(ledger.sweep_dir / "means.csv", _csv_of_means(groups, monitors))
        tables_kept += ", means.csv"
    done = [e for e in entries if _has(e, monitors)]
    pictures = ""
    if len(done) > 1:
        _to_tensorboard(ledger, parallel_coordinates(done, monitors), groups, monitors[0])
        pictures = " and parallel.png"
    if done:
        sign = 1 if modes[0] == "min" else -1
        best = min(done, key=lambda e: sign * e.metrics[monitors[0]])
        console.print(
            f"Best run: {escape(best.run_dir)} ({monitors[0]} {best.metrics[monitors[0]]:.5g})", soft_wrap=True
        )
    console.print(
        f"Kept in {ledger.sweep_dir}: {tables_kept}{pictures}.\nLook at it:    tensorboard --logdir {ledger.sweep_dir}",
        soft_wrap=True,
    )
    return groups


def _of_last_call(ledger: Ledger) -> list[Entry]:
    """The jobs that the sweep was last asked for; an earlier grid's others, with other settings, do not belong."""
    path = ledger.sweep_dir / "jobs.json"
    keys = set(json.loads(path.read_text(encoding="utf-8"))["keys"]) if path.exists() else None
    return [e for e in ledger.entries() if keys is None or e.key in keys]


def _keys(groups: Sequence[Group]) -> list[str]:
    return list(dict.fromkeys(key for group in groups for key in group.point))


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.5g}"


def _table(groups: Sequence[Group], monitors: Sequence[str], modes: Sequence[str], seeds: bool) -> Table:
    of = " and ".join(
        f"{m} ({'lower' if mode == 'min' else 'higher'} is better)" for m, mode in zip(monitors, modes, strict=True)
    )
    table = Table(title=f"Sweep, by {of}", title_justify="left")
    keys = _keys(groups)
    for key in keys:
        table.add_column(key)
    for name in [f"{monitors[0]}, mean", "± 95 %", "runs"] if seeds else list(monitors):
        table.add_column(name, justify="right")
    table.add_column("status")
    best_of_all = [True] + [False] * (len(groups) - 1)
    if len(monitors) > 1:
        points = [_values(g, monitors) for g in groups]
        whole = [n for n, p in enumerate(points) if p is not None]
        on = front([p for p in points if p is not None], modes)
        best_of_all = [False] * len(groups)
        for n, is_on in zip(whole, on, strict=True):
            best_of_all[n] = is_on
        table.caption = "bold: on the Pareto front, no other is better in one without being worse in another"
    for group, best in zip(groups, best_of_all, strict=True):
        cells = [escape(group.point.get(key, "")) for key in keys]
        if seeds:
            cells += [_number(group.mean), _number(group.half_width), str(len(group.values))]
        else:
            last = group.entries[-1]
            cells += [_number(last.metrics.get(m, math.nan)) for m in monitors]
        states = [e.status for e in group.entries]
        table.add_row(*cells, ", ".join(dict.fromkeys(states)), style="bold" if best and group.values else None)
    return table


def _values(group: Group, monitors: Sequence[str]) -> list[float] | None:
    found = [e.metrics for e in group.entries if e.status == "done" and all(m in e.metrics for m in monitors)]
    return [statistics.fmean(m[name] for m in found) for name in monitors] if found else None


def _comparisons(groups: Sequence[Group], monitor: str) -> Table:
    best = groups[0]
    name = ", ".join(f"{k}={v}" for k, v in best.point.items()) or "the best"
    table = Table(title=f"Against {escape(name)}, seed by seed", title_justify="left")
    for column in ("other", f"difference of {monitor}", "± 95 %", "seeds", ""):
        table.add_column(column, justify="left" if column in ("other", "") else "right")
    for other in groups[1:]:
        difference, half, n = compared(best, other)
        if n:
            clear = "" if math.isnan(half) else "differs" if abs(difference) > half else "may be chance"
            label = ", ".join(f"{k}={v}" for k, v in other.point.items())
            table.add_row(escape(label), f"{difference:+.5g}", _number(half), str(n), clear)
    return table


def _others(entries: Sequence[Entry]) -> Table:
    table = Table(title="Not done", title_justify="left")
    for column in ("job", "status", "attempts", "why"):
        table.add_column(column, overflow="fold")
    for entry in entries:
        if entry.status not in ("done", "pruned"):
            point = ", ".join(f"{k}={v}" for k, v in entry.point.items())
            table.add_row(escape(point), entry.status, str(entry.attempts), escape(entry.said[:300]))
    return table


def _csv_of_means(groups: Sequence[Group], monitors: Sequence[str]) -> str:
    """A row a point: mean over seeds and half its 95 % interval, of each number that jobs are compared by."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = _keys(groups)
    writer.writerow([*keys, "runs", *(column for m in monitors for column in (m, f"{m} +-95%"))])
    for group in groups:
        done = [e for e in group.entries if e.status == "done" and all(m in e.metrics for m in monitors)]
        cells: list[Any] = []
        for m in monitors:
            values = [e.metrics[m] for e in done]
            cells += [statistics.fmean(values) if values else "", half_width(values) if len(values) > 1 else ""]
        writer.writerow([*(group.point.get(k, "") for k in keys), len(done), *cells])
    return text.getvalue()


def _csv(entries: Sequence[Entry], monitors: Sequence[str], modes: Sequence[str]) -> str:
    """A row a run: what it varies, how it ended, whether it is on the Pareto front of several numbers, all it
    measured."""
    keys = list(dict.fromkeys(key for e in entries for key in e.point))
    metrics = sorted({name for e in entries for name in e.metrics} - set(monitors))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["run", *([] if "seed" in keys else ["seed"]), *keys, "trial", "status", "attempts", "wall_seconds"]
    on_front: dict[str, str] = {}
    if len(monitors) > 1:
        columns.append("pareto_front")
        whole = [e for e in entries if e.status == "done" and all(m in e.metrics for m in monitors)]
        best = front([[e.metrics[m] for m in monitors] for e in whole], modes)
        on_front = {e.key: "yes" if on else "no" for e, on in zip(whole, best, strict=True)}
    writer.writerow([*columns, "said", *monitors, *metrics])
    for e in entries:
        own: dict[str, Any] = {
            "run": Path(e.run_dir).name,
            "seed": e.seed,
            **e.point,
            "trial": "" if e.trial is None else e.trial,
        }
        own |= {"status": e.status, "attempts": e.attempts, "wall_seconds": round(e.seconds, 3)}
        own["pareto_front"] = on_front.get(e.key, "")
        writer.writerow(
            [*(own.get(c, "") for c in columns), e.said, *(e.metrics.get(m, "") for m in (*monitors, *metrics))]
        )
    return text.getvalue()


def parallel_coordinates(entries: Sequence[Entry], monitors: Sequence[str]) -> Figure:
    """A line for each run through what it varies and what it measured, coloured by the first of these."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    keys = list(dict.fromkeys(key for e in entries for key in e.point))
    axes_of: list[tuple[str, list[float], list[tuple[float, str]]]] = []
    for key in keys:
        texts = [e.point.get(key, "") for e in entries]
        axes_of.append((key, *_axis(texts)))
    for name in monitors:
        axes_of.append((name, *_axis([str(e.metrics[name]) for e in entries])))
    figure = Figure(figsize=(max(6, 1.9 * len(axes_of)), 4.6), layout="constrained")
    axes = figure.add_subplot()
    colours = [e.metrics[monitors[0]] for e in entries]
    scale = Normalize(min(colours), max(colours) if max(colours) > min(colours) else min(colours) + 1)
    places = range(len(axes_of))
    for number, value in enumerate(colours):
        heights = [positions[number] for _, positions, _ in axes_of]
        axes.plot(places, heights, color=colormaps["viridis_r"](scale(value)), alpha=0.75, linewidth=1.5)
    for place, (_, _, ticks) in zip(places, axes_of, strict=True):
        axes.axvline(place, color="0.6", linewidth=0.8, zorder=0)
        for height, text in ticks:
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
            axes.annotate(text, (place, height), (4, 0), textcoords="offset points", fontsize=8, va="center", bbox=box)
    axes.set_xticks(list(places), [name for name, _, _ in axes_of], fontsize=9)
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(axes_of) - 0.6)
    axes.set_ylim(-0.06, 1.06)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.colorbar(ScalarMappable(scale, colormaps["viridis_r"]), ax=axes, label=monitors[0])
    return figure


def _axis(texts: list[str]) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights in [0, 1] of values, numbers by size (by its logarithm where they span two orders) and others in the
    order met; and the marks of the axis."""
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        names = list(dict.fromkeys(texts))
        step = 1 / max(1, len(names) - 1)
        return [names.index(t) * step for t in texts], [(n * step, name) for n, name in enumerate(names)]
    low, high = min(numbers), max(numbers)
    if low == high:
        return [0.5] * len(numbers), [(0.5, f"{low:.4g}")]
    log = low > 0 and high / low >= 100
    bend = math.log if log else float
    heights = [(bend(n) - bend(low)) / (bend(high) - bend(low)) for n in numbers]
    distinct = sorted(set(numbers))
    if len(distinct) > 6:
        marks = [0, 0.25, 0.5, 0.75, 1]
        at = [low * (high / low) ** m if log else low + (high - low) * m for m in marks]
        return heights, [(m, f"{value:.4g}") for m, value in zip(marks, at, strict=True)]
    return heights, [((bend(n) - bend(low)) / (bend(high) - bend(low)), f"{n:.4g}") for n in distinct]


def _to_tensorboard(ledger: Ledger, figure: Figure, groups: Sequence[Group], monitor: str) -> None:
    """The picture and the table as a page of their own beside the runs, whose HPARAMS compare them one by one."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from torch.utils.tensorboard import SummaryWriter

    canvas = FigureCanvasAgg(figure)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(ledger.sweep_dir / "parallel.png", picture.getvalue())
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    keys = _keys(groups)
    lines = ["| " + " | ".join([*keys, monitor, "± 95 %", "runs"]) + " |", "|---" * (len(keys) + 3) + "|"]
    for group in groups:
        numbers = (_number(group.mean), _number(group.half_width), str(len(group.values)))
        lines.append("| " + " | ".join([*(group.point.get(k, "") for k in keys), *numbers]) + " |")
    folder = ledger.sweep_dir / "report"
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    writer = SummaryWriter(str(folder))
    writer.add_image("sweep/parallel_coordinates", pixels, 0, dataformats="HWC")
    writer.add_text("sweep/table", "\n".join(lines), 0)
    writer.close()
