"""Every family and objective is as exact over processes, micro-batches and interruptions as the first one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmexp.contracts import UserError
from lmexp.job.train import train
from lmexp.task.base import BaseTask
from tests.runs import TINY, assert_same, checkpoint, corpus, plan, run, scalars

PLAIN = [option for option in TINY if not option.startswith("data.corpus") and option != "data=files"]
ENGLISH_GERMAN = [
    (f"the house number {i} has {i * 7 % 90} windows", f"das Haus Nummer {i} hat {i * 7 % 90} Fenster")
    for i in range(120)
]
KINDS = {
    "masked": ["model=bert", "objective=masked_lm"],
    "masked_documents": ["model=bert_modern", "objective=masked_lm_whole_word", "data.document_mask=true"],
    "span": ["model=t5", "model.d_ff=32", "objective=span_corruption", "objective.sentinels=4"],
    "denoise": ["model=transformer", "objective=denoising"],
    "prefix": ["model=gpt", "objective=prefix_lm"],
    "prefix_t5": ["model=t5", "model.d_ff=32", "objective=prefix_lm"],
    "fim": ["model=llama", "model.d_ff=24", "objective=causal_lm_fim"],
    "translation": ["model=bert", "model.n_languages=2", "objective=translation_lm"],
    "pairs": ["model=transformer", "objective=text_to_text", "callback=text_to_text", "decoding=greedy"],
    "pairs_decoder": ["model=gpt", "objective=text_to_text"],
    "pairs_tokens": ["model=transformer", "objective=text_to_text", "batch_size=null", "data.batch_tokens=600"],
    "mixture": ["model=bert", "objective=masked_lm"],
}


def data_is_paired(kind: str) -> bool:
    return kind in ("translation", "pairs", "pairs_decoder", "pairs_tokens")


def data(kind: str, folder: Path) -> list[str]:
    if data_is_paired(kind):
        for column, name in enumerate(("en", "de")):
            text = "\n".join(pair[column] for pair in ENGLISH_GERMAN)
            (folder / f"train.{name}").write_text(text, encoding="utf-8")
        files = f"{{en:{folder}/train.en,de:{folder}/train.de}}"
        return [
            *("data=parallel_files", f"data.corpus.use={'both' if kind == 'translation' else 'pairs'}"),
            "data.block_size=112",
            *(f"data.corpus.train={files}", f"data.corpus.validation={files}"),
        ]
    if kind == "mixture":
        nodes = []
        for column, name in enumerate(("en", "de")):
            path = folder / f"{name}.txt"
            path.write_text("\n".join(pair[column] for pair in ENGLISH_GERMAN[: 120 - 90 * column]), encoding="utf-8")
            nodes.append(f"{name}:{{_target_:lmexp.corpus.files.Files,path:{path},by:tail,validation_fraction:0.3}}")
        return ["data=mixture", f"data.corpus.parts={{{','.join(nodes)}}}"]
    return ["data=files", "data.corpus.by=tail", corpus(folder)]


def arguments(kind: str, folder: Path) -> list[str]:
    return [
        *(option for option in PLAIN if not (data_is_paired(kind) and option.startswith("data.block_size"))),
        *data(kind, folder),
        *KINDS[kind],
        f"paths.cache_dir={folder / 'cache'}",
        "optimizer.lr=0.003",
        "max_steps=12",
        "validate_every=6",
        "log_every=3",
    ]


def crash(task: BaseTask, *arguments: Any) -> Any:
    """Ends the run in the middle of its tenth step, with nothing saved for it."""
    if task.trainer.global_step == 9:
        raise RuntimeError("crash")
    return MEAN_AND_CLIP(task, *arguments)


MEAN_AND_CLIP = BaseTask._mean_and_clip


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_crashed_goes_on_to_the_bit(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = [*arguments(kind, tmp_path), "callback.checkpoint.every_steps=4"]
    train(plan(*args, f"paths.run_dir={tmp_path / 'whole'}"))
    parts = f"paths.run_dir={tmp_path / 'parts'}"
    with monkeypatch.context() as patch:
        patch.setattr(BaseTask, "_mean_and_clip", crash)
        with pytest.raises(RuntimeError, match="crash"):
            train(plan(*args, parts, "resume=auto"))
    train(plan(*args, parts, "resume=auto"))
    a, b = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    for key in ("state_dict", "optimizer_states", "TextData"):
        assert_same(a[key], b[key], key)
    assert_same(a["lmexp"]["random"], b["lmexp"]["random"])
    whole, pieces = scalars(tmp_path / "whole"), scalars(tmp_path / "parts")
    for tag in whole:
        if not tag.startswith(("speed/", "memory/")) or tag == "speed/tokens":
            assert whole[tag] == pieces[tag], tag
    assert [step for step, _ in pieces["train/loss"]] == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_and_micro_batches_give_the_same_numbers(tmp_path: Path, kind: str) -> None:
    args = arguments(kind, tmp_path)
    args += ["model.dropout=0"] if kind != "fim" else []  # its randomness is each process's own
    args += ["model.attention_dropout=0"] if "model=bert" in args else []
    train(plan(*args, f"paths.run_dir={tmp_path / 'one'}"))
    train(plan(*args, f"paths.run_dir={tmp_path / 'micro'}", "trainer.micro_batch_size=2"))
    done = run(*args, "trainer=ddp_sim", f"paths.run_dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    one = scalars(tmp_path / "one")
    for name in ("micro", "two"):
        other = scalars(tmp_path / name)
        for tag in one:
            if tag.startswith(("train/", "val/", "optim/grad_norm", "data/drawn", "speed/tokens")) and tag != (
                "speed/tokens_per_second"
            ):
                assert [s for s, _ in one[tag]] == [s for s, _ in other[tag]], f"{name} {tag}"
                expected = pytest.approx([v for _, v in one[tag]], rel=1e-5, abs=1e-6)
                assert [v for _, v in other[tag]] == expected, f"{name} {tag}"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model=bert"], r"CausalLM trains decoder models, and BertConfig is an encoder; choose objective=masked_lm"),
        (["model=gpt", "objective=masked_lm"], r"MaskedLM trains encoder models, and GPTConfig is a decoder"),
        (
            ["model=t5", "model.d_ff=32", "objective=masked_lm"],
            r"T5Config is an encoder-decoder; choose objective=span_corr",
        ),
        (
            ["model=t5", "model.d_ff=32", "objective=span_corruption", "objective.sentinels=1", "data.block_size=64"],
            r"sentinels=1",
        ),
        (
            ["model=t5", "model.d_ff=32", "objective=span_corruption", "data.document_mask=true"],
            r"data.document_mask=true: objective SpanCorruption",
        ),
    ],
)
def test_what_does_not_fit_is_told(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        train(plan(*TINY, corpus(tmp_path), *overrides, f"paths.run_dir={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()


def test_pairs_and_languages_that_do_not_fit_are_told(tmp_path: Path) -> None:
    for overrides, said in (
        (["objective=masked_lm"], r"MaskedLM reads single texts, and the corpus has pairs \(en-de\)"),
        (["model.n_languages=1"], r"language_embeddings=true with 2 languages.*set model.n_languages=2"),
    ):
        with pytest.raises(UserError, match=said):
            train(plan(*arguments("translation", tmp_path), *overrides, f"paths.run_dir={tmp_path / 'run'}"))
    (tmp_path / "train.de").write_text("ein Satz\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"120.*1"):
        train(plan(*arguments_again(tmp_path), f"paths.run_dir={tmp_path / 'run'}"))


def arguments_again(folder: Path) -> list[str]:
    """Those of pairs, without writing the files anew."""
    kept = {path: path.read_bytes() for path in folder.glob("train.*")}
    args = arguments("translation", folder)
    for path, content in kept.items():
        path.write_bytes(content)
    return args


def test_a_checkpoint_of_another_family_is_refused(tmp_path: Path) -> None:
    args = arguments("masked", tmp_path)
    train(plan(*args, f"paths.run_dir={tmp_path / 'bert'}"))
    other = [*arguments("prefix", tmp_path), f"init_from={tmp_path / 'bert'}", f"paths.run_dir={tmp_path / 'gpt'}"]
    with pytest.raises(UserError, match=r"init_from=.*BertConfig.*the model is lmexp.model.gpt.GPTConfig"):
        train(plan(*other))
    done = run("job=generate", f"ckpt={tmp_path / 'bert'}", "trainer=cpu")
    assert done.returncode == 2
    assert "holds an encoder" in done.stderr


def test_weights_go_on_under_another_objective(tmp_path: Path) -> None:
    """From masked LM to masked LM on other words: the weights are the source's, and what is new is said."""
    args = arguments("masked", tmp_path)
    train(plan(*args, f"paths.run_dir={tmp_path / 'first'}"))
    second = [*args, f"init_from={tmp_path / 'first'}", "optimizer.lr=0", "optimizer.embedding_lr=0"]
    second += ["optimizer.vector_lr=0", "optimizer.head_lr=0", f"paths.run_dir={tmp_path / 'second'}", "max_steps=1"]
    train(plan(*second))
    assert_same(
        checkpoint(tmp_path / "first", "best.ckpt")["state_dict"], checkpoint(tmp_path / "second")["state_dict"]
    )


def test_a_run_goes_on_when_what_it_began_with_is_gone(tmp_path: Path) -> None:
    args = arguments("masked", tmp_path)
    train(plan(*args, f"paths.run_dir={tmp_path / 'first'}"))
    second = [*args, f"init_from={tmp_path / 'first'}", f"paths.run_dir={tmp_path / 'second'}", "resume=auto"]
    train(plan(*second, "max_steps=6"))
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    train(plan(*second))
    assert checkpoint(tmp_path / "second")["lmexp"]["step"] == 12
    missing = [*args, f"init_from={tmp_path / 'first'}", f"paths.run_dir={tmp_path / 'third'}"]
    with pytest.raises(UserError, match=r"does not exist|no folder"):
        train(plan(*missing))
    assert not (tmp_path / "third").exists()
