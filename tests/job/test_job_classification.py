"""Classification from the configuration to the scores of the test split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from lmexp.contracts import UserError
from lmexp.job.evaluate import evaluate
from lmexp.job.export import export
from lmexp.job.restore import restore
from lmexp.job.train import train
from lmexp.task.base import BaseTask
from tests.job.test_job_objectives import crash
from tests.runs import TINY, assert_same, checkpoint, plan, run, scalars

PLAIN = [o for o in TINY if not o.startswith(("data", "model.n_layers", "callback.samples"))]
FAMILIES = {
    "encoder": ["model=bert", "model.n_layers=2"],
    "decoder": ["model=gpt", "model.n_layers=2"],
    "encoder_decoder": ["model=transformer", "model.n_layers=1"],
}


def rows(kind: str, n: int = 60) -> list[dict[str, Any]]:
    """Texts whose label is whether they say good, or which of the words they say."""
    found = []
    for i in range(n):
        good, quick = i % 2 == 0, i % 3 == 0
        text = f"the {'good' if good else 'bad'} one of {i} is {'quick' if quick else 'slow'}"
        label: Any = "yes" if good else "no"
        if kind == "multilabel":
            label = ["good"] * good + ["quick"] * quick
        row = {"text": text, "label": label, "kind": f"k{i % 2}"}
        found.append({**row, "second": f"is it {'good' if i % 5 else 'bad'}"} if kind == "pairs" else row)
    return found


def arguments(folder: Path, kind: str = "single", family: str = "encoder") -> list[str]:
    files = {}
    for split, n in (("train", 60), ("validation", 21), ("test", 13)):
        files[split] = folder / f"{split}.jsonl"
        files[split].write_text("".join(json.dumps(row) + "\n" for row in rows(kind, n)), encoding="utf-8")
    return [
        *(PLAIN),
        *FAMILIES[family],
        *("data=labelled_files", *(f"data.corpus.{split}={path}" for split, path in files.items())),
        *("data.corpus.group=kind", "data.block_size=48", "data.eval_batch_size=4"),
        *(["data.corpus.text=[text,second]"] if kind == "pairs" else []),
        *(["data.corpus.multilabel=true"] if kind == "multilabel" else []),
        *("objective=classification", "task=classification", "metric=classification", "callback=classification"),
        *("metric.bootstrap=5", "callback.predictions.shown=2", "model.dropout=0", "task.dropout=0"),
        *(["model.attention_dropout=0"] if family == "encoder" else []),
        *("optimizer.lr=0.003", "max_steps=6", "validate_every=3", "log_every=3", "tokenizer=byte"),
        f"paths.cache_dir={folder / 'cache'}",
    ]


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        *(("single", family) for family in FAMILIES),
        *(("pairs", "encoder"), ("multilabel", "encoder"), ("pairs", "encoder_decoder")),
    ],
)
def test_numbers_do_not_depend_on_how_the_batch_is_split(tmp_path: Path, kind: str, family: str) -> None:
    args = arguments(tmp_path, kind, family)
    if kind == "pairs" and family == "encoder":
        args.append("objective.segments=true")
    train(plan(*args, f"paths.run_dir={tmp_path / 'whole'}"))
    train(plan(*args, f"paths.run_dir={tmp_path / 'micro'}", "trainer.micro_batch_size=1"))
    whole, micro = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "micro"))
    named = {"test/loss", "test/accuracy", "test/accuracy_ci", "test/f1", "test/auroc", "test/ece", "val/matthews"}
    assert named | {"test/accuracy/k0", "test/accuracy/k1"} <= whole.keys()
    for name in named:  # a last bit may turn an order, and one of these few an area by a step
        near = {"abs": 0.05} if "auroc" in name else {"rel": 1e-4, "abs": 1e-6}
        assert micro[name] == pytest.approx(whole[name], **near), name
    curves = scalars(tmp_path / "whole")
    assert [step for step, _ in curves["val/accuracy"]] == [3, 6]
    if family != "encoder":
        return

    for trainer in ("ddp_sim", "tp_fsdp_sim"):
        done = run(*args, f"trainer={trainer}", f"paths.run_dir={tmp_path / trainer}")
        assert done.returncode == 0, done.stderr
        two = json.loads((tmp_path / trainer / "metrics.json").read_text())
        for name in named:
            near = {"abs": 0.05} if "auroc" in name else {"rel": 1e-4, "abs": 1e-6}
            assert two[name] == pytest.approx(whole[name], **near), name


@pytest.mark.slow
def test_any_file_is_scored_without_those_that_it_was_trained_on(tmp_path: Path) -> None:
    """A checkpoint that was taken elsewhere: only the split asked for is read; keys are judged by the checkpoint."""
    run_dir, out = tmp_path / "run", tmp_path / "out.json"
    args = [*(a for a in arguments(tmp_path) if not a.startswith("batch_size")), "batch_size=null"]
    args += ["data.batch_tokens=300", f"paths.run_dir={run_dir}"]
    done = run(*args)
    assert done.returncode == 0, done.stderr
    assert "Scored on test" in done.stdout
    metrics = json.loads((run_dir / "metrics.json").read_text())
    other = tmp_path / "other.tsv"
    rows_of_it = ["sentence\tis"] + [f"{row['text']}\t{row['label']}" for row in rows("single", 13)]
    other.write_text("\n".join(rows_of_it), encoding="utf-8")
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").unlink()

    def scored(*more: str) -> dict[str, float]:
        done = run("job=evaluate", f"ckpt={run_dir}", "job.split=test", "trainer=cpu", f"out={out}", *more)
        assert done.returncode == 0, done.stderr
        found: dict[str, float] = json.loads(out.read_text())
        return found

    same = scored("metric.bootstrap=0")
    for name in ("test/accuracy", "test/loss", "test/accuracy/k1"):
        assert same[name] == pytest.approx(metrics[name], rel=1e-6)
    assert "test/accuracy_ci" not in same
    keys = (f"data.corpus.test={other}", "data.corpus.text=sentence", "data.corpus.label=is", "data.corpus.group=null")
    for more in (keys, ("data=labelled_files", *keys), (*keys, "data=labelled_files")):
        assert scored(*more)["test/loss"] == pytest.approx(metrics["test/loss"], rel=1e-6)
    numbers = tmp_path / "numbers.tsv"
    numbers.write_text("text\tlabel\ngood\t1\nbad\t0\n", encoding="utf-8")
    for more, said in (
        (("data=labelled_files", f"data.corpus.test={numbers}", "job.split=test"), "label '1' is none of the classes"),
        (("data=labelled_files", f"data.corpus.test={numbers}"), "job.split=validation: the data have no such split"),
        (("callback.answers.tokenize=char", "job.split=test"), "has no such key"),
    ):
        done = run("job=evaluate", f"ckpt={run_dir}", *more)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert "+" not in done.stderr.split(":")[1]
    for key, said in (("lable", "Did you mean data.corpus.label?"), ("languages", "its corpus is LabelledFiles")):
        done = run("job=evaluate", f"ckpt={run_dir}", "job.split=test", f"data.corpus.{key}=[en,de]")
        assert done.returncode == 2
        assert said in done.stderr
    done = run("job=evaluate", f"ckpt={run_dir}", "callback.checkpoint.keep=2")
    assert done.returncode == 2
    assert "the checkpoint decides this" in done.stderr
    without = [a for a in args if not a.startswith(("data.corpus.train", "paths.run_dir"))]
    done = run(*without, f"paths.run_dir={tmp_path / 'no'}", "data.corpus.labels=[no,yes]")
    assert done.returncode == 2
    assert "no training split" in done.stderr
    few = [a for a in args if not a.startswith(("data.batch_tokens", "data.corpus.train"))]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows("single")), encoding="utf-8")
    few += [f"data.corpus.train={tmp_path / 'train.jsonl'}", f"data.corpus.validation={other.with_name('test.jsonl')}"]
    for tokens, code in ((7, 2), (300, 0)):  # nothing was begun, so the directory is free
        done = run(*few, f"data.batch_tokens={tokens}", f"paths.run_dir={tmp_path / 'few'}", "max_steps=1")
        assert done.returncode == code, done.stderr


def test_a_run_that_crashed_goes_on_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = [*arguments(tmp_path), "task.dropout=0.3", "model.dropout=0.2", "max_steps=12", "validate_every=6"]
    args += ["callback.checkpoint.every_steps=4", "task.class_weights=balanced", "optimizer=adamw"]
    args += ["optimizer.layer_decay=0.8", "task.label_smoothing=0.1", "task.freeze=[embed]"]
    train(plan(*args, f"paths.run_dir={tmp_path / 'whole'}"))
    parts = f"paths.run_dir={tmp_path / 'parts'}"
    with monkeypatch.context() as patch:
        patch.setattr(BaseTask, "_mean_and_clip", crash)
        with pytest.raises(RuntimeError, match="crash"):
            train(plan(*args, parts))
    train(plan(*args, parts, "resume=auto"))
    whole, parted = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    for name in ("state_dict", "optimizer_states"):
        assert_same(whole[name], parted[name], name)


def test_evaluation_and_prediction_tell_the_same(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(plan(*arguments(tmp_path), f"paths.run_dir={run_dir}", "max_steps=30"))
    metrics = json.loads((run_dir / "metrics.json").read_text())
    asked = ["job=evaluate", f"ckpt={run_dir}", "job.split=test"]
    evaluate(plan(*asked, "trainer=cpu", f"out={tmp_path / 'one.json'}", f"job.predictions={tmp_path / 'one.jsonl'}"))
    done = run(*asked, "trainer=ddp_sim", f"out={tmp_path / 'two.json'}", f"job.predictions={tmp_path / 'two.jsonl'}")
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    for name in ("test/loss", "test/accuracy", "test/accuracy_ci", "test/f1/yes", "test/auroc", "test/accuracy/k1"):
        assert one[name] == pytest.approx(metrics[name], rel=1e-5), name
        assert two[name] == pytest.approx(metrics[name], rel=1e-5), name
    lines = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    again = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    assert [row["text"] for row in lines] == [row["text"] for row in rows("single", 13)]
    for a, b in zip(lines, again, strict=True):
        assert {k: v for k, v in a.items() if k != "probabilities"} == {
            k: v for k, v in b.items() if k != "probabilities"
        }
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-5)
    right = sum(row["told"] == row["label"] for row in lines) / len(lines)
    assert right == pytest.approx(metrics["test/accuracy"])

    texts = tmp_path / "texts.txt"
    texts.write_text("".join(row["text"] + "\n" for row in lines), encoding="utf-8")
    done = run("job=predict", f"ckpt={run_dir}", f"job.input={texts}", "job.batch_size=5", "trainer=cpu")
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["told"] for row in told] == [row["told"] for row in lines]
    for a, b in zip(told, lines, strict=True):
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-5)
    done = run("job=predict", f"ckpt={run_dir}", f"job.input={tmp_path / 'test.jsonl'}", f"out={tmp_path / 'p.jsonl'}")
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])
    assert first["kind"] == "k0", "what the row had stays"
    assert first["told"] == told[0]["told"]


def test_a_pretrained_encoder_gives_all_but_its_head(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(row["text"] for row in rows("single")), encoding="utf-8")
    pretrain = [
        *PLAIN,
        *FAMILIES["encoder"],
        "data=files",
        "data.corpus.by=tail",
        f"data.corpus.path={tmp_path}/text.txt",
    ]
    pretrain += ["data.block_size=48", "objective=masked_lm", "max_steps=3", f"paths.cache_dir={tmp_path / 'cache'}"]
    train(plan(*pretrain, f"paths.run_dir={tmp_path / 'lm'}", "callback.samples.prompts=[]"))
    args = [*arguments(tmp_path), f"init_from={tmp_path / 'lm'}", "optimizer=adamw", "optimizer.lr=0"]
    args += ["tokenizer=pretrained", f"tokenizer.path={tmp_path / 'lm' / 'tokenizer.json'}", "max_steps=1"]
    train(plan(*args, f"paths.run_dir={tmp_path / 'tuned'}"))
    before, after = (checkpoint(tmp_path / name)["state_dict"] for name in ("lm", "tuned"))
    for name in before.keys() & after.keys():
        assert torch.equal(before[name], after[name]), name
    assert {n for n in after if n not in before} == {
        f"model.head.{layer}.{kind}" for layer in ("hidden", "output") for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("kind", ["single", "multilabel", "pairs"])
def test_transformers_tells_the_same_and_gives_it_back(tmp_path: Path, kind: str) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "exported"
    args = arguments(tmp_path, kind)
    segments = ["objective.segments=true"] if kind == "pairs" else []
    train(plan(*args, *segments, f"paths.run_dir={run_dir}", "max_steps=3"))
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").rename(tmp_path / f"{split}.moved")  # a checkpoint needs no data to be used
    export(plan("job=export", f"ckpt={run_dir}", f"out={out}"))
    theirs = hf.AutoModelForSequenceClassification.from_pretrained(out).eval()
    restored = restore(plan("job=evaluate", f"ckpt={run_dir}", "trainer=cpu"), 1)
    task = restored.task.eval()
    assert tuple(theirs.config.id2label.values()) == task.metric.classes
    text, second = "the good one of 7", "is it good" if kind == "pairs" else None
    cls, eos = restored.tokenizer.roles["cls"], restored.tokenizer.eos_id
    ids = [[int(i) for i in row] for row in restored.tokenizer.encode([text, second or ""])]
    tokens = [cls, *ids[0], eos, *([*ids[1], eos] if second else [])]
    kinds = [0] * (len(ids[0]) + 2) + [1] * (len(tokens) - len(ids[0]) - 2)
    asked = tmp_path / "asked.txt"
    asked.write_text(text + (f"\t{second}" if second else "") + "\n", encoding="utf-8")
    done = run("job=predict", f"ckpt={run_dir}", f"job.input={asked}", "trainer=cpu")
    assert done.returncode == 0, done.stderr
    told_by = hf.AutoTokenizer.from_pretrained(out)(text, second)
    assert told_by["input_ids"] == tokens, "the exported tokenizer puts the marks that training did"
    if kind == "pairs":
        assert told_by["token_type_ids"] == kinds
    with torch.no_grad():
        logits = theirs(torch.tensor([tokens]), token_type_ids=torch.tensor([kinds])).logits[0]
    expected = logits.sigmoid() if kind == "multilabel" else logits.softmax(-1)
    told = json.loads(done.stdout)["probabilities"]
    assert list(told.values()) == pytest.approx(expected.tolist(), abs=1e-5)

    # and back: their weights, head included, are where a run begins
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.moved").rename(tmp_path / f"{split}.jsonl")
    again = [a for a in args if a != "tokenizer=byte"] + ["tokenizer=pretrained", f"tokenizer.path={out}"]
    again += [f"init_from={out}", "optimizer=adamw", "optimizer.lr=0", "max_steps=1", *segments]
    train(plan(*again, f"paths.run_dir={tmp_path / 'again'}"))
    before, after = (checkpoint(folder)["state_dict"] for folder in (run_dir, tmp_path / "again"))
    for name in ("model.head.hidden.weight", "model.head.output.bias", "model.blocks.1.mlp.expand.weight"):
        assert torch.equal(before[name], after[name]), name


def test_other_classes_are_refused_in_scoring_and_taken_anew_in_training(tmp_path: Path) -> None:
    run_dir, args = tmp_path / "run", arguments(tmp_path)
    train(plan(*args, f"paths.run_dir={run_dir}", "max_steps=3"))
    turned = "data.corpus.labels=[yes,no]"
    with pytest.raises(UserError, match=r"tells no, yes, and the data have yes, no; expected.*labels=\[no,yes\]"):
        evaluate(plan("job=evaluate", f"ckpt={run_dir}", "trainer=cpu", f"+{turned}"))
    more = [f"init_from={run_dir}", "optimizer=adamw", "optimizer.lr=0", "max_steps=1"]
    train(plan(*args, turned, *more, f"paths.run_dir={tmp_path / 'turned'}"))
    train(plan(*args, *more, f"paths.run_dir={tmp_path / 'same'}"))
    before, turned_state, same = (checkpoint(tmp_path / n)["state_dict"] for n in ("run", "turned", "same"))
    name = "model.head.output.weight"
    assert torch.equal(before[name], same[name])
    assert not torch.equal(before[name], turned_state[name])
    assert torch.equal(before["model.head.hidden.weight"], turned_state["model.head.hidden.weight"])
    decoder = arguments(tmp_path, family="decoder")
    train(plan(*decoder, f"paths.run_dir={tmp_path / 'decoder'}", "max_steps=1"))
    with pytest.raises(UserError, match=r"Classifiers of GPT cannot be exported yet"):
        export(plan("job=export", f"ckpt={tmp_path / 'decoder'}", f"out={tmp_path / 'out'}"))
    done = run("job=evaluate", f"ckpt={tmp_path / 'decoder'}", f"job.questions={tmp_path / 'test.jsonl'}")
    assert done.returncode == 2, done.stderr
    done = run("job=predict", f"ckpt={run_dir}", f"job.input={tmp_path / 'x.tsv'}")
    assert done.returncode == 2
    assert "is a table; expected a text on each line" in done.stderr


def test_early_stopping_ends_and_stays_ended(tmp_path: Path) -> None:
    args = [*arguments(tmp_path), "optimizer=adamw", "optimizer.lr=0", "callback.early_stopping.patience=2"]
    args += [f"paths.run_dir={tmp_path / 'run'}", "max_steps=30"]
    train(plan(*args))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["steps"] == 9, "the first validation is the best, two more are waited for"
    train(plan(*args, "resume=auto"))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 9
    assert checkpoint(tmp_path / "run")["lmexp"]["step"] == 9


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    where = f"paths.run_dir={tmp_path / 'run'}"
    args = arguments(tmp_path)
    for overrides, said in (
        (["metric=language_modeling"], r"metric=LanguageModeling is not.*task=classification objective=classification"),
        (["task=pretrain"], r"task=Pretrain is not"),
        (["objective=masked_lm"], r"objective=MaskedLM is not"),
        (["callback=default"], r"callback.samples continues texts, and a classifier writes none"),
        (["objective.segments=true", "model.n_segments=0"], r"segments=true, and BertConfig has no segment embedding"),
        (["objective.max_length=99"], r"max_length=99 is more than data.block_size=48"),
        (["task.class_weights=[1]"], r"class_weights=\[1\]; expected balanced, null, or 2 numbers.*no, yes"),
        (["task.pooling=middle"], r"task.pooling=middle; expected first, mean, last or null"),
        (["task.label_smoothing=1"], r"task.label_smoothing=1"),
        (["task.freeze=[block]"], r"task.freeze=block: Bert has no such part.*begin with blocks, embed"),
        (["task.freeze=['*']"], r"leaves nothing to train"),
        (["callback.checkpoint.monitor=val/bleu"], r"monitor=val/bleu; expected one of val/loss, val/accuracy"),
        (["optimizer=adamw", "optimizer.layer_decay=0"], r"optimizer.layer_decay=0; expected a factor above 0"),
        (["callback.early_stopping.patience=0"], r"patience=0; expected at least 1"),
    ):
        group = overrides[0].partition("=")[0]
        fitting = [o for o in args if not (group in ("metric", "task", "callback") and o.startswith(f"{group}."))]
        with pytest.raises(UserError, match=said):
            train(plan(*fitting, *overrides, where))
    decoder = arguments(tmp_path, family="decoder")
    with pytest.raises(UserError, match=r"task.pooling=first with a model of the family decoder"):
        train(plan(*decoder, "task.pooling=first", where))


def test_other_jobs_refuse_a_classifier(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(plan(*arguments(tmp_path), f"paths.run_dir={run_dir}", "max_steps=1"))
    restored = restore(plan("job=evaluate", f"ckpt={run_dir}", "trainer=cpu"), 1)
    assert restored.task.model.head.output.out_features == 2
    done = run("job=generate", f"ckpt={run_dir}")
    assert done.returncode == 2
    assert "use job=predict" in done.stderr
    done = run("job=predict", f"ckpt={run_dir}")
    assert done.returncode == 2
    assert "job.input is not given" in done.stderr
