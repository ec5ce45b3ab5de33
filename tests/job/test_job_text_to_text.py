"""Translation from the configuration to the scores of the test split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmexp.contracts import UserError
from lmexp.decoding.beam import Beam, beam_search
from lmexp.decoding.generate import Sampling, generate
from lmexp.job.evaluate import evaluate
from lmexp.job.restore import restore
from lmexp.job.train import train
from tests.job.test_job_objectives import PLAIN, data
from tests.runs import TINY, corpus, plan, run, scalars


def arguments(folder: Path) -> list[str]:
    return [
        *(o for o in PLAIN if not o.startswith(("data.block_size", "callback.samples"))),
        *(o.replace("use=both", "use=pairs") for o in data("translation", folder)),
        f"data.corpus.test={{en:{folder}/train.en,de:{folder}/train.de}}",
        *("model=transformer", "model.dropout=0", "objective=text_to_text", "callback=text_to_text"),
        *(
            "decoding=greedy",
            "callback.answers.examples=7",
            "callback.answers.bootstrap=20",
            "callback.answers.shown=2",
        ),
        *(f"paths.cache_dir={folder / 'cache'}", "max_steps=6", "validate_every=3", "optimizer.lr=0.003"),
    ]


def test_a_translation_run_scores_its_test_split(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    args = arguments(tmp_path)
    train(plan(*args, f"paths.run_dir={run_dir}"))
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert {"test/bleu", "test/bleu_ci", "test/chrf", "test/exact_match", "test/loss", "val/bleu"} <= set(metrics)
    curves = scalars(run_dir)
    assert [step for step, _ in curves["val/bleu"]] == [3, 6]

    # the same from the checkpoint, on one process, on two and on two that share it out, to the last example
    told = []
    for name, more in (("one", []), ("two", ["trainer=ddp_sim"]), ("shared", ["trainer=tp_fsdp_sim"])):
        out = tmp_path / f"{name}.json"
        rows = tmp_path / f"{name}.jsonl"
        asked = ["job=evaluate", f"ckpt={run_dir}", "job.split=test", f"out={out}", f"job.predictions={rows}", *more]
        if more:
            done = run(*asked)
            assert done.returncode == 0, done.stderr
        else:
            evaluate(plan(*asked, "trainer=cpu"))
        measured = json.loads(out.read_text())
        for key in ("test/bleu", "test/chrf", "test/exact_match", "test/length_ratio", "test/loss"):
            assert measured[key] == pytest.approx(metrics[key], rel=1e-6), key
        told.append(rows.read_text(encoding="utf-8"))
    assert len(told[0].splitlines()) == 120
    assert told == [told[0]] * 3

    # two processes train and score as one does
    for trainer in ("ddp_sim", "tp_fsdp_sim"):
        done = run(*args, f"trainer={trainer}", f"paths.run_dir={tmp_path / trainer}")
        assert done.returncode == 0, done.stderr
        two = json.loads((tmp_path / trainer / "metrics.json").read_text())
        for key in ("test/bleu", "test/chrf", "test/exact_match", "test/loss", "val/bleu"):
            assert two[key] == pytest.approx(metrics[key], rel=1e-5), key

    # going on with a finished run scores it again, to the same numbers
    (run_dir / "metrics.json").unlink()
    train(plan(*args, f"paths.run_dir={run_dir}", "resume=auto"))
    again = json.loads((run_dir / "metrics.json").read_text())
    assert again["test/bleu"] == metrics["test/bleu"]


def test_generation_reads_a_source_as_training_did(tmp_path: Path) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "out.jsonl"
    train(plan(*arguments(tmp_path), f"paths.run_dir={run_dir}", "max_steps=3"))
    source = "the house number 3"
    asked = ["job=generate", f"ckpt={run_dir}", "trainer=cpu", f"job.prompt={source}", f"out={out}"]
    done = run(*asked, "decoding=greedy")
    assert done.returncode == 0, done.stderr
    restored = restore(plan("job=generate", f"ckpt={run_dir}", "trainer=cpu"), 1)
    tokenizer = restored.tokenizer
    prompt = [*(int(i) for i in tokenizer.encode([source])[0]), tokenizer.eos_id]
    sampling = Sampling(temperature=0, max_new_tokens=112)  # of 200 as many as a target has room for
    (expected,) = generate(restored.task.model, [prompt], sampling, tokenizer.eos_id, tokenizer.vocab_size)
    assert json.loads(out.read_text())["text"] == tokenizer.decode(expected, skip_special=True)

    done = run(*asked, "decoding=beam", "job.samples=3")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    beam = Beam(beams=4, max_new_tokens=112)
    (best,) = beam_search(restored.task.model.eval(), [prompt], beam, tokenizer.eos_id, tokenizer.vocab_size)
    assert [row["text"] for row in rows] == [tokenizer.decode(t, skip_special=True) for _, t in best[:3]]
    assert [row["score"] for row in rows] == pytest.approx([score for score, _ in best[:3]])
    done = run("job=generate", f"ckpt={run_dir}", "trainer=cpu", f"job.prompt={'house ' * 30}", "decoding=greedy")
    assert done.returncode == 0, done.stderr
    assert "1 of 1 texts are longer than the model reads, and cut" in done.stderr
    done = run(*asked, "decoding=beam", "job.samples=5")
    assert done.returncode == 2
    assert "set decoding.beams=5" in done.stderr


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    where = f"paths.run_dir={tmp_path / 'run'}"
    with pytest.raises(
        UserError, match=r"TextToText reads a text beside the one to write for it.*single texts \(en, de\)"
    ):
        train(plan(*arguments(tmp_path), "data.corpus.use=both", where))
    with pytest.raises(UserError, match=r"TextToText reads a text beside"):
        train(plan(*TINY, corpus(tmp_path), "model=gpt", "objective=text_to_text", where))
    plain = [o for o in arguments(tmp_path) if not o.startswith("callback")]
    with pytest.raises(UserError, match=r"monitor=val/bleu; expected one of val/loss"):
        train(plan(*plain, "callback.checkpoint.monitor=val/bleu", where))
    for overrides, said in (
        (["decoding=sample"], r"decoding.temperature=0.8 draws it by lot; choose decoding=greedy"),
        (["objective=span_corruption"], r"SpanCorruption reads single texts.*objective=text_to_text"),
        (["objective.max_source=200"], r"block_size=112 has no room for objective.max_source=200"),
        (["callback.answers.bootstrap=1"], r"bootstrap=1; one resample has no interval"),
    ):
        with pytest.raises(UserError, match=said):
            train(plan(*arguments(tmp_path), *overrides, where))
    with pytest.raises(UserError, match=r"decodes the sources of pairs, and objective CausalLM has none"):
        train(plan(*TINY, corpus(tmp_path), "model=gpt", "callback=text_to_text", "decoding=greedy", where))
    with pytest.raises(UserError, match=r"callback.answers.examples=0; expected a whole number of at least 1"):
        train(plan(*arguments(tmp_path), "callback.answers.examples=0", where))
    assert not (tmp_path / "run").exists()


def test_prediction_writes_what_the_evaluation_scored(tmp_path: Path) -> None:
    run_dir, asked, told = tmp_path / "run", tmp_path / "asked.txt", tmp_path / "told.jsonl"
    train(plan(*arguments(tmp_path), f"paths.run_dir={run_dir}", "max_steps=3"))
    common = [f"ckpt={run_dir}", "trainer=cpu"]
    evaluate(plan("job=evaluate", *common, "job.split=test", "job.max_blocks=5", f"job.predictions={told}"))
    with pytest.raises(UserError, match="draws it by lot; choose decoding=greedy"):
        evaluate(plan("job=evaluate", *common, "job.split=test", "decoding=sample"))
    rows = [json.loads(line) for line in told.read_text().splitlines()]
    assert [set(row) for row in rows] == [{"place", "source", "reference", "output", "chrF"}] * 5
    asked.write_text("".join(row["source"] + "\n" for row in rows), encoding="utf-8")
    done = run("job=predict", *common, f"job.input={asked}", "job.batch_size=2")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["output"] for line in done.stdout.splitlines()] == [row["output"] for row in rows]

    # what is drawn by lot is each row's own, whichever rows are read together
    asked.write_text("the house number 3\n" * 5, encoding="utf-8")
    drawn = []
    for size in (2, 5):
        done = run("job=predict", *common, f"job.input={asked}", f"job.batch_size={size}", "decoding=sample")
        drawn.append([json.loads(line)["output"] for line in done.stdout.splitlines()])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 5

    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": "the house " * 40, "id": 7}) + "\n", encoding="utf-8")
    done = run("job=predict", *common, f"job.input={long}")
    assert json.loads(done.stdout)["id"] == 7
    assert "1 of 1 texts are longer than the model reads, and cut" in done.stderr
    for content, said in (
        ('{"text": 3}\n\n{"x"\n', "line 1, 3: expected an object with text"),
        ("\n", "holds no text"),
    ):
        long.write_text(content, encoding="utf-8")
        done = run("job=predict", *common, f"job.input={long}")
        assert done.returncode == 2
        assert said in done.stderr


@pytest.mark.slow
def test_own_pairs_for_the_recipe_and_scoring_them_elsewhere(tmp_path: Path) -> None:
    """`experiment=translate` takes other files; with the checkpoint only the file that is scored is needed."""
    small = [a for a in arguments(tmp_path) if not a.startswith(("model=", "objective=", "callback=", "optimizer"))]
    run_dir, out = tmp_path / "run", tmp_path / "out.json"
    done = run("experiment=translate", *small, "validate_every=3", f"paths.run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((run_dir / "metrics.json").read_text())
    for name in ("en", "de"):
        (tmp_path / f"train.{name}").rename(tmp_path / f"moved.{name}")
    asked = ["job=evaluate", f"ckpt={run_dir}", "job.split=test", "trainer=cpu", f"out={out}"]
    asked += [f"data.corpus.test={{en:{tmp_path}/moved.en,de:{tmp_path}/moved.de}}"]
    done = run(*asked, "callback.answers.tokenize=char", "callback.answers.bootstrap=0", "callback.answers.shown=0")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["test/chrf"] == pytest.approx(metrics["test/chrf"], rel=1e-6)
    assert "|tok:char|" in found["signature"]
    assert "test/chrf_ci" not in found
    assert "Worst and best" not in done.stdout
    done = run("experiment=translate", *small, "decoding.min_new_tokens=120", f"paths.run_dir={tmp_path / 'no'}")
    assert done.returncode == 2
    assert "decoding.min_new_tokens=120, and a target has room for 112 tokens" in done.stderr


def test_the_best_bleu_ends_a_run(tmp_path: Path) -> None:
    """At a rate of 0 no validation is better than the first."""
    run_dir = tmp_path / "run"
    asked = ["optimizer.lr=0", "optimizer=adamw", "callback.early_stopping.patience=2", "max_steps=30"]
    monitor = ["callback.checkpoint.monitor=val/bleu", "callback.checkpoint.mode=max"]
    train(plan(*arguments(tmp_path), *asked, *monitor, f"paths.run_dir={run_dir}"))
    assert json.loads((run_dir / "metrics.json").read_text())["steps"] == 9
    assert (run_dir / "checkpoints" / "best.ckpt").resolve().name == "step-000000003.ckpt"


def test_summaries_are_scored_beside_the_lead(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    asked = ["callback.answers.score=summarization", "callback.checkpoint.monitor=val/rougeL"]
    train(plan(*arguments(tmp_path), *asked, "callback.checkpoint.mode=max", f"paths.run_dir={run_dir}", "max_steps=3"))
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert {"test/rougeL", "test/rougeL_ci", "test/lead_rougeL", "test/novel_bigrams", "val/rouge2"} <= set(metrics)
    with pytest.raises(UserError, match=r"callback.answers.score=rouge; expected translation or summarization"):
        train(plan(*arguments(tmp_path), "callback.answers.score=rouge", f"paths.run_dir={tmp_path / 'other'}"))


def test_what_is_cut_is_told(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(plan(*arguments(tmp_path), "objective.max_target=20", f"paths.run_dir={run_dir}", "max_steps=3"))
    log = (run_dir / "run.log").read_text()
    assert "Too long for the model and cut: 120 of 120 train en-de target (100.0%)" in " ".join(log.split())
    assert "en-de source" not in log.split("Model:")[0].split("cut:")[-1]
