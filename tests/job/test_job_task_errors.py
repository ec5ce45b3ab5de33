"""Mistakes with tasks as users make them, by the command line: exit code 2 and one message with the fix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.job import test_job_classification as labels
from tests.job import test_job_text_to_text as texts
from tests.job.test_job_errors import refused
from tests.runs import run

pytestmark = pytest.mark.slow


def without(args: list[str], *names: str) -> list[str]:
    return [arg for arg in args if arg.partition("=")[0] not in names]


def go(folder: Path, args: list[str], *words: str) -> None:
    refused(run(*args, f"paths.run_dir={folder / 'run'}"), *words)
    assert not (folder / "run" / "checkpoints").exists()


def test_a_missing_column(tmp_path: Path) -> None:
    go(tmp_path, [*labels.arguments(tmp_path), "data.corpus.text=txt"], "'txt'", "text", "data.corpus.text=NAME")
    table = tmp_path / "pairs.tsv"
    table.write_text("en\tde\none\teins\n" * 2, encoding="utf-8")
    args = without(texts.arguments(tmp_path), "data.corpus.train")
    args += [f"data.corpus.train={table}", "data.corpus.languages=[en,fr]"]
    args = [*without(args, "data.corpus.validation", "data.corpus.test"), f"data.corpus.validation={table}"]
    go(tmp_path, args, "no column 'fr'", "data.corpus.languages=[en,de]")


def test_labels_outside_the_classes_are_named_by_their_lines(tmp_path: Path) -> None:
    args = labels.arguments(tmp_path)
    rows = labels.rows("single", 21)
    for place in (3, 11):
        rows[place]["label"] = "maybe"
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    go(tmp_path, args, "validation.jsonl", "lines 4 and 12", "'maybe'", "data.corpus.labels")


def test_broken_rows_are_named_by_their_lines(tmp_path: Path) -> None:
    args = labels.arguments(tmp_path)
    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()
    for broken, word in ((lines[4][:-7], "not JSON"), (json.dumps({"label": "no"}), "no text in column 'text'")):
        lines[4] = lines[8] = broken
        (tmp_path / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
        go(tmp_path, args, "train.jsonl", "lines 5 and 9", word)


def test_an_empty_target(tmp_path: Path) -> None:
    args = texts.arguments(tmp_path)
    german = (tmp_path / "train.de").read_text(encoding="utf-8").splitlines()
    german[6] = german[30] = "  "
    (tmp_path / "train.de").write_text("\n".join(german), encoding="utf-8")
    go(tmp_path, args, "train.de, lines 7 and 31: the text in en or de is empty", "data.corpus.skip_incomplete=true")
    done = run(*args, "data.corpus.skip_incomplete=true", f"paths.run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "Left out, as a side of the pair is empty: 2 of 120 rows of train en-de (1.7%)." in done.stdout


def test_a_source_longer_than_the_model(tmp_path: Path) -> None:
    args = [*texts.arguments(tmp_path), "model.max_length=64"]
    go(tmp_path, args, "block_size=112", "max_length=64")
    go(tmp_path, [*texts.arguments(tmp_path), "objective.max_source=300"], "max_source=300", "data.block_size=300")


def test_initial_weights_with_another_tokenizer(tmp_path: Path) -> None:
    args = texts.arguments(tmp_path)
    done = run(*args, "max_steps=1", f"paths.run_dir={tmp_path / 'first'}")
    assert done.returncode == 0, done.stderr
    other = [*without(args, "tokenizer"), "tokenizer=bpe", "tokenizer.vocab_size=300"]
    go(tmp_path, [*other, f"init_from={tmp_path / 'first'}"], f"init_from={tmp_path / 'first'}", "tokenizer")


def test_a_metric_that_does_not_fit_the_task(tmp_path: Path) -> None:
    go(tmp_path, [*labels.arguments(tmp_path), "callback.checkpoint.monitor=val/bleu"], "val/bleu", "val/accuracy")
    go(tmp_path, [*texts.arguments(tmp_path), "metric=classification"], "metric=ClassificationScores", "labels")


def test_several_languages_to_write(tmp_path: Path) -> None:
    args = [*without(texts.arguments(tmp_path), "data.corpus.train", "data.corpus.validation", "data.corpus.test")]
    for split in ("train", "validation"):
        table = tmp_path / f"{split}.tsv"
        table.write_text("en\tde\tfr\none\teins\tun\n" * 2, encoding="utf-8")
        args.append(f"data.corpus.{split}={table}")
    go(tmp_path, [*args, "data.corpus.languages=[en,de,fr]"], "does not tell the model which language", "de, fr")
