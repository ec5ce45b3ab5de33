"""Questions in context: shots, scores and errors; the whole command against a brute force over its checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lmexp.contracts import UserError
from lmexp.decoding.generate import Sampling
from lmexp.job.evaluate import evaluate
from lmexp.job.in_context import (
    Asked,
    InContext,
    layout_of,
    measure_answers,
    measure_choices,
    prompt_text,
    score_choices,
    write_answers,
)
from lmexp.job.questions import Question, draw_shots, read_questions
from lmexp.job.restore import restore
from lmexp.job.train import train
from lmexp.metric.answers import f1, interval, normalized
from lmexp.model.bert import BertConfig
from lmexp.model.gpt import GPTConfig
from lmexp.model.layers import Head
from lmexp.model.t5 import T5Config
from lmexp.objective.causal_lm import CausalLM
from lmexp.objective.prefix_lm import PrefixLM
from lmexp.tokenizer.bpe import BPE
from lmexp.tokenizer.byte import ByteTokenizer
from lmexp.tokenizer.char import CharTokenizer
from tests.runs import TINY, corpus, plan, run

CHOICES = [
    {"question": "the model reads a", "choices": ["line", "model of them", "word"], "answer": 0},
    {"question": "one of", "choices": ["them", "reads"], "answer": 0},
    {"question": "and another", "choices": ["one", "writes a", "the"], "answer": 1},
    {"question": "writes", "choices": ["a", "another of them", "one", "the"], "answer": 3},
    {"question": "the", "choices": ["model", "of"], "answer": 0},
]


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def question(text: str = "q", choices: tuple[str, ...] = (), right: int | None = None, *answers: str) -> Question:
    return Question(text, None, choices, right, answers or (choices[right or 0],), 1)


def restored(model: Any, tokenizer: Any = None, objective: Any = None) -> Any:
    """What scoring needs of a checkpoint."""
    return SimpleNamespace(
        task=SimpleNamespace(model=model),
        tokenizer=tokenizer or ByteTokenizer(),
        parts=SimpleNamespace(objective=objective or CausalLM()),
        path="x.ckpt",
        classes=None,
    )


def likelihoods(
    model: Any, questions: list[Question], tokenizer: Any = None, objective: Any = None, **keys: Any
) -> Any:
    settings = InContext("x.jsonl", **keys)
    there = restored(model, tokenizer, objective)
    asked = [Asked(row, q, (), ()) for row, q in enumerate(questions)]
    return score_choices(there, settings, layout_of(there, settings), asked)


class Bigram(nn.Module):
    """A decoder made by hand: after each byte comes the one that `follows` gives, with probability 0.9."""

    family, max_length = "decoder", 24

    def __init__(self, follows: dict[str, str]) -> None:
        super().__init__()
        self.head = Head(257, 257)
        probability = torch.full((257, 257), 1 / 257)
        for one, other in follows.items():
            probability[1 + ord(one)] = 0.1 / 256
            probability[1 + ord(one), 1 + ord(other)] = 0.9
        self.head.weight.data = probability.log().T
        self.steps = 0

    def forward(self, tokens: Any, documents: Any = None, positions: Any = None, cache: Any = None) -> Any:
        self.steps += 1
        if cache is not None:
            cache.length += tokens.shape[1]
        return nn.functional.one_hot(tokens, 257).float()

    def new_cache(self, *shape: Any) -> Any:
        return SimpleNamespace(length=0, places=None, begin_columns=lambda: None)


# ---- a model whose answers are known


def test_likelihoods_of_a_bigram_model_are_its_closed_form() -> None:
    model = Bigram({"a": "b", "b": "b", "c": "c", "r": "c"})
    asked = [question("a", ("b", "cccc", "bb"), 2), question("a", ("x", "b"), 0)]
    (one, two) = likelihoods(model, asked, template="{question}{answer}", unconditional="Answer")
    likely, other = math.log(0.9), math.log(0.1 / 256)
    assert one["log_likelihood"] == pytest.approx([likely, other + 3 * likely, 2 * likely], rel=1e-5)
    assert one["unconditional"] == pytest.approx([other, 4 * likely, other + likely], rel=1e-5)
    assert one["bytes"] == [1, 4, 2]
    assert two["log_likelihood"] == pytest.approx([other, likely], rel=1e-5)
    measured = measure_choices([one, two])
    # the sum says b, and so does the quotient; by byte the two that always go on are as likely, and the first counts
    assert one["chosen"] == {"accuracy": 0, "accuracy_per_byte": 0, "accuracy_unconditional": 0}
    assert two["chosen"]["accuracy"] == 1
    assert measured["accuracy"].mean == 0
    assert measure_choices([{**one, "answer": 0}, two])["accuracy"].mean == 0.5


def test_the_three_rules_choose_by_their_formulas() -> None:
    row = {"log_likelihood": [-3.0, -4.0, -9.0], "unconditional": [-1.0, -3.0, -9.5], "bytes": [2, 3, 9], "answer": 2}
    measured = measure_choices([row])
    assert row["chosen"] == {"accuracy": 0, "accuracy_per_byte": 2, "accuracy_unconditional": 2}
    assert [score.mean for score in measured.values()] == [0, 1, 1]


def test_answers_of_a_bigram_model() -> None:
    model = Bigram({"a": " ", " ": "t", "t": "h", "h": "e", "e": "\n", "\n": "z", "x": "y", "y": "y"})
    settings = InContext("x.jsonl", score="generation", template="{question}{answer}", batch_size=2)
    there = restored(model)
    questions = [question("a", (), None, "T.", "the"), question("x", (), None, "no")]
    batches = [[Asked(row, q, (), ()) for row, q in enumerate(questions)]]
    sampling = Sampling(temperature=0, max_new_tokens=9)
    one, two = write_answers(there, settings, layout_of(there, settings), sampling, batches)
    assert (one["text"], one["exact_match"], one["f1"]) == ("the", 1, 1)
    assert (two["text"], two["exact_match"], two["f1"]) == ("y" * 9, 0, 0)
    assert model.steps == 9
    model.steps = 0
    write_answers(there, settings, layout_of(there, settings), sampling, [batches[0][:1]])
    assert model.steps == 5  # nothing is written after the end of the last answer


# ---- tokens and prompts


def test_one_token_over_the_end_of_the_prompt_is_scored_with_every_choice() -> None:
    tokenizer = BPE(vocab_size=300).train(iter(["catalog catalog catalog cat dog"] * 9))
    torch.manual_seed(0)
    model = GPTConfig(n_layers=1, n_heads=2, d_model=16, max_length=32).build(tokenizer.vocab_size).double()
    settings = InContext("x.jsonl", template="{question}{answer}", unconditional=None)
    layout = layout_of(restored(model, tokenizer), settings)
    split = layout.split("a cat", ["alog", " dog"])
    assert split.inside
    assert split.prompt[0] == tokenizer.eos_id
    texts = [tokenizer.decode([*split.prompt[1:], *c]) for c in split.continuations]
    assert texts == ["a catalog", "a cat dog"]
    assert [list(split.prompt[1:]) + list(c) for c in split.continuations] == [
        row.tolist() for row in tokenizer.encode(texts)
    ]
    assert not layout.split("a cat", [" dog", " cat"]).inside
    (result,) = likelihoods(model, [question("a cat", ("alog", " dog"), 0)], tokenizer, template="{question}{answer}")
    assert result["split_inside"]


def test_spaces_before_the_answer_go_with_it() -> None:
    settings = InContext("x", template="Q: {question}\nA:  {answer}.", instruction="Solve\\n", separator="\\n--\\n")
    text = prompt_text(settings, question("{2}", ("3", "4"), 1), [question("1", ("5",), 0)])
    assert text == ("Solve\n\n--\nQ: 1\nA:  5.\n--\nQ: {2}\nA:", "  ")
    braces = InContext("x", template="{{answer}} {context}{question}={answer} {{}}")
    assert prompt_text(braces, Question("q", "c", (), None, ("a",), 1), []) == ("{answer} cq=", "")


def test_long_prompts_lose_the_oldest_shots_first_then_their_start() -> None:
    torch.manual_seed(0)
    model = GPTConfig(n_layers=1, n_heads=2, d_model=16, max_length=24).build(257)
    there, settings = restored(model), InContext("x", template="{question}={answer}", separator=";", shots=3)
    shots = tuple(question(letter * 4, (), None, "1") for letter in "abc")  # 6 bytes each, and a separator
    asked = [
        Asked(0, question("dd", ("1", "22"), 0), shots, (7, 8, 9)),
        Asked(1, question("d" * 30, ("1", "2"), 0), (), ()),
    ]
    one, two = score_choices(there, settings, layout_of(there, settings), asked)
    assert one["shots"] == [8, 9]  # 1 + 2 * 7 + 3 + 1 tokens are read, with a third shot 7 more
    assert one["cut"]
    assert two["cut"]
    cut = likelihoods(model, [question("d" * 23, ("1", "2"), 0)], template="{question}={answer}")[0]
    assert cut["log_likelihood"] == pytest.approx(two["log_likelihood"])
    whole = likelihoods(model, [question("bbbb=1;cccc=1;dd", ("1", "22"), 0)], template="{question}={answer}")[0]
    assert not whole["cut"]
    assert whole["log_likelihood"] == pytest.approx(one["log_likelihood"])
    with pytest.raises(UserError, match=r"line 1: a choice is 25 tokens"):
        likelihoods(model, [question("q", ("x" * 25, "y"), 0)], template="{question}{answer}")


def test_prompts_of_generation_are_cut_too() -> None:
    model = Bigram({"a": "b", "b": "\n"})
    settings = InContext("x", score="generation", template="{question}{answer}", separator=";")
    there, sampling = restored(model), Sampling(temperature=0, max_new_tokens=6)
    shots = tuple(question("s" * 6, (), None, "t") for _ in range(4))
    asked = [
        [
            Asked(0, question("xa", (), None, "b"), shots, (0, 1, 2, 3)),
            Asked(1, question("a" * 30, (), None, "b"), (), ()),
        ]
    ]
    one, two = write_answers(there, settings, layout_of(there, settings), sampling, asked)
    assert (one["text"], one["cut"], one["shots"]) == (
        "b",
        True,
        [3],
    )  # 1 + 8 + 2 of the 18 tokens that there is room for
    assert (two["text"], two["cut"]) == ("b", True)


def test_unknown_text_is_told() -> None:
    torch.manual_seed(0)
    tokenizer = CharTokenizer("abc ")
    model = GPTConfig(n_layers=1, n_heads=2, d_model=16, max_length=24).build(tokenizer.vocab_size)
    rows = likelihoods(model, [question("a", ("b", "c"), 0), question("a", ("b", "z"), 0)], tokenizer)
    assert [row["unknown"] for row in rows] == [False, True]


# ---- families


def test_an_encoder_decoder_reads_the_prompt_and_is_scored_on_the_choice() -> None:
    torch.manual_seed(0)
    model = T5Config(n_layers=2, n_heads=2, d_model=16, d_ff=24, max_length=24).build(257).double().eval()
    rows = likelihoods(model, [question("who", ("me", "you all"), 0), question("a longer one", ("x", "y"), 1)])
    tokenizer = ByteTokenizer()
    for row in rows:
        for name, prompt in (("log_likelihood", row["question"]), ("unconditional", "Answer:")):
            for choice, got in zip(row["choices"], row[name], strict=True):
                source = [*tokenizer.encode([prompt])[0].tolist(), 0]
                target = tokenizer.encode([choice])[0].tolist()
                hidden = model(torch.tensor([source]), torch.tensor([[0, *target[:-1]]]))
                steps = model.head(hidden)[0].log_softmax(-1)
                assert got == pytest.approx(sum(steps[n, t].item() for n, t in enumerate(target)), rel=1e-10)
    settings = InContext("x", score="generation")
    there = restored(model)
    asked = [[Asked(0, question("who", (), None, "me"), (), ())]]
    (result,) = write_answers(
        there, settings, layout_of(there, settings), Sampling(temperature=0, max_new_tokens=3), asked
    )
    assert 0 <= result["f1"] <= 1


def test_an_encoder_is_scored_by_masking_and_does_not_write() -> None:
    torch.manual_seed(0)
    tokenizer = ByteTokenizer().with_roles(("mask", "cls"))
    model = BertConfig(n_layers=2, n_heads=2, d_model=16, max_length=24).build(tokenizer.vocab_size).double().eval()
    (row,) = likelihoods(model, [question("who", ("me", "you all"), 0)], tokenizer, unconditional=None)
    for choice, got in zip(row["choices"], row["log_likelihood"], strict=True):
        text = [tokenizer.roles["cls"], *tokenizer.encode([f"who {choice}"])[0].tolist(), 0]
        expected = 0.0
        for place in range(4, len(text) - 1):
            hidden = [*text]
            hidden[place] = tokenizer.roles["mask"]
            expected += model.head(model(torch.tensor([hidden])))[0, place].log_softmax(-1)[text[place]].item()
        assert got == pytest.approx(expected, rel=1e-10)
    with pytest.raises(UserError, match="reads and does not write"):
        layout_of(restored(model, tokenizer), InContext("x", score="generation"))
    with pytest.raises(UserError, match="no mask token"):
        layout_of(restored(model), InContext("x"))


def test_a_decoder_of_prefix_lm_sees_the_prompt_both_ways() -> None:
    torch.manual_seed(0)
    model = GPTConfig(n_layers=2, n_heads=2, d_model=16, max_length=24).build(257).double().eval()
    asked = [question("who", ("me",) * 2, 0)]
    (row,) = likelihoods(model, asked, objective=PrefixLM())
    text = ByteTokenizer().encode(["who me"])[0].tolist()
    steps = model.head(model(torch.tensor([[0, *text[:-1]]]), prefix=torch.tensor([4])))[0].log_softmax(-1)
    assert row["log_likelihood"][0] == pytest.approx(sum(steps[n, text[n]].item() for n in (3, 4, 5)), rel=1e-10)
    assert likelihoods(model, asked)[0]["log_likelihood"] != row["log_likelihood"]


# ---- shots


def test_shots_are_a_function_of_seed_and_row_and_never_the_question_itself() -> None:
    pool = [question(f"{n % 40}", (), None, "a") for n in range(50)]  # ten are asked twice
    drawn = [draw_shots(pool, pool[row], 12, 1, row) for row in range(50)]
    assert drawn == [draw_shots(pool, pool[row], 12, 1, row) for row in range(50)]
    for row, shots in enumerate(drawn):
        assert len(set(shots)) == 12
        assert all(pool[i].question != pool[row].question for i in shots)
    assert len({tuple(shots) for shots in drawn}) == 50
    assert drawn != [draw_shots(pool, pool[row], 12, 2, row) for row in range(50)]
    assert draw_shots(pool, pool[3], 5, 1, 3) == drawn[3][:5]
    assert draw_shots(pool, pool[3], 0, 1, 3) == []
    assert sorted(draw_shots(pool, pool[3], 48, 1, 3)) == [i for i in range(50) if i not in (3, 43)]
    other = question("other", (), None, "a")
    counts = torch.bincount(torch.tensor([i for row in range(4000) for i in draw_shots(pool, other, 5, 0, row)]))
    assert (counts - 400).abs().max() < 5 * (400 * 0.9) ** 0.5  # each as often as another
    with pytest.raises(UserError, match=r"job.shots=49.*48 examples"):
        draw_shots(pool, pool[3], 49, 1, 3)


# ---- measures


def test_the_interval_is_wilsons() -> None:
    """Its ends are the p at which the mean lies 1.96 standard errors away: (m - p)^2 = z^2 p (1 - p) / n."""
    for hits, n in ((0, 5), (3, 10), (50, 100), (99, 100), (7, 7), (1, 1)):
        score = interval([1.0] * hits + [0.0] * (n - hits))
        assert score.mean == pytest.approx(hits / n)
        for end in (score.low, score.high):
            distance = 1.959963984540054**2 * end * (1 - end) / n
            assert (score.mean - end) ** 2 == pytest.approx(distance, abs=1e-12)
        assert 0 <= score.low <= score.mean <= score.high <= 1
    assert interval([1.0] * 81 + [0.0] * 182)[1:] == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I


def test_squad_measures() -> None:
    assert normalized(" The  Cat, an A-B  theatre! ") == "cat ab theatre"
    assert f1("the cat sat", "a cat sat down.") == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert f1("cat cat", "cat dog") == pytest.approx(0.5)
    assert (f1("dog", "cat"), f1("the", "a"), f1("", "cat")) == (0, 1, 0)
    rows = [{"exact_match": 1.0, "f1": 1.0}, {"exact_match": 0.0, "f1": 0.5}]
    measured = measure_answers(rows)
    assert (measured["exact_match"].mean, measured["f1"].mean) == (0.5, 0.75)


# ---- files and settings


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2 is no JSON"),
        ([1], "line 2: expected an object"),
        ({"question": "q"}, "line 2: no answer"),
        ({"question": "q", "answer": "a", "choice": []}, "line 2: unknown choice"),
        ({"question": 1, "answer": "a"}, "line 2: question is 1"),
        ({"question": "q", "answer": 1}, "line 2: answer is 1"),
        ({"question": "q", "answer": []}, "line 2: answer is"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "line 2: answer is 2; expected the index .* 0 to 1"),
        ({"question": "q", "choices": ["a", "b"], "answer": -1}, "line 2: answer is -1"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "line 2: answer is True"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "line 2: choices"),
        ({"question": "q", "answer": "a", "context": "c"}, "line 2: it has a context"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, row: Any, message: str) -> None:
    path = tmp_path / "q.jsonl"
    good = json.dumps({"question": "q", "answer": "a"})
    path.write_text(f"{good}\n{row if isinstance(row, str) else json.dumps(row)}\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_questions(str(path), "job.questions", False)


def test_right_rows_and_wrong_files(tmp_path: Path) -> None:
    path = written(tmp_path / "q.jsonl", [{"question": "q", "answer": ["a", "b"]}, CHOICES[1]])
    one, two = read_questions(str(path), "job.questions", False)
    assert (one.answers, one.choices, one.right) == (("a", "b"), (), None)
    assert (two.answers, two.right, two.line) == (("them",), 0, 2)
    with pytest.raises(UserError, match="no context"):
        read_questions(str(path), "job.questions", True)
    with pytest.raises(UserError, match=r"job.examples=nowhere.* cannot be read"):
        read_questions("nowhere.jsonl", "job.examples", False)
    path.write_text("\n")
    with pytest.raises(UserError, match="no rows"):
        read_questions(str(path), "job.questions", False)


@pytest.mark.parametrize(
    "setting",
    [
        {"shots": -1},
        {"shots": True},
        {"batch_size": 0},
        {"score": "f1"},
        {"rows": 1},
        {"separator": ""},
        {"stop": None},
        {"unconditional": 3},
        *(
            {"template": t}
            for t in ("", "{question}", "{answer} {question}", "{question} {answer} {other}", "{question} {")
        ),
        *(
            {"template": t}
            for t in ("{question:>9} {answer}", "{question}{answer}{answer}", "{question}{answer}{context}")
        ),
    ],
)
def test_wrong_settings_are_named(setting: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"job.{next(iter(setting))}="):
        InContext("x.jsonl", **setting)


# ---- the command


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on a small text."""
    folder = tmp_path_factory.mktemp("finished")
    out = folder / "run"
    args = [*TINY, corpus(folder), f"paths.cache_dir={folder / 'cache'}", f"paths.run_dir={out}", "model.max_length=96"]
    train(plan(*args, "max_steps=8", "validate_every=8", "log_every=4"))
    return out


def measured(finished: Path, folder: Path, *overrides: str, rows: list[Any] | None = None) -> dict[str, Any]:
    questions, out = written(folder / "questions.jsonl", rows or CHOICES), folder / "out.json"
    names = ["job=evaluate", f"ckpt={finished}", "trainer=cpu", f"job.questions={questions}", f"out={out}"]
    value = evaluate(plan(*names, "job.rows=true", *overrides))
    content: dict[str, Any] = json.loads(out.read_text())
    assert value == content["exact_match" if "job.score=generation" in overrides else "accuracy"]
    return content


def test_choices_are_scored_as_a_brute_force_does(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["job.shots=2", 'job.template="{question}: {answer}."', r'job.separator="\n"', 'job.unconditional="so:"']
    content = measured(finished, tmp_path, *keys)
    shown = capsys.readouterr().out
    for text in ("5 questions, 2 shots", "accuracy_unconditional", "95 % interval"):
        assert text in " ".join(shown.split())
    there = restore(plan("job=evaluate", f"ckpt={finished}", "trainer=cpu"), 1)
    model = there.task.model.eval()

    @torch.no_grad()
    def brute_force(prompt: str, continuation: str) -> float:
        tokens = [0, *(1 + byte for byte in (prompt + continuation).encode())]
        steps = model.head(model(torch.tensor([tokens])))[0].double().log_softmax(-1)
        n = len(continuation.encode())
        return sum(steps[place - 1, tokens[place]].item() for place in range(len(tokens) - n, len(tokens)))

    hits = 0
    for number, (row, result) in enumerate(zip(CHOICES, content["rows"], strict=True)):
        assert result["row"] == number
        assert number not in result["shots"]
        assert len(result["shots"]) == 2
        shots = [CHOICES[i] for i in result["shots"]]
        solved = "".join(f"{s['question']}: {s['choices'][s['answer']]}.\n" for s in shots)
        scores = [brute_force(f"{solved}{row['question']}:", f" {choice}") for choice in row["choices"]]
        assert result["log_likelihood"] == pytest.approx(scores, rel=1e-5)
        assert result["unconditional"] == pytest.approx([brute_force("so:", f" {c}") for c in row["choices"]], rel=1e-5)
        hits += scores.index(max(scores)) == row["answer"]
    assert content["accuracy"] == hits / 5
    assert content["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 2) / 5)
    assert content["accuracy/low"] < content["accuracy"] < content["accuracy/high"] or hits in (0, 5)
    assert (content["questions"], content["shots"], content["steps"], content["cut"]) == (5, 2, 8, 0)


def same(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Equal up to the rounding of sums in another order."""
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == (pytest.approx(b[key], rel=1e-5) if key in ("log_likelihood", "unconditional") else b[key])
    assert {**one, "rows": 0} == {**two, "rows": 0}


def test_answers_are_written_and_nothing_depends_on_the_batch(finished: Path, tmp_path: Path) -> None:
    whole = measured(finished, tmp_path, "job.shots=2", "job.batch_size=64")
    same(measured(finished, tmp_path, "job.shots=2", "job.batch_size=1"), whole)
    assert measured(finished, tmp_path, "job.shots=2", "seed=5")["rows"] != whole["rows"]
    rows = [{"question": "the model", "answer": ["reads", "writes"]}, {"question": "one", "answer": "of"}, CHOICES[3]]
    keys = ("job.score=generation", "job.shots=1", "decoding.max_new_tokens=6")
    one, two = (measured(finished, tmp_path, *keys, f"job.batch_size={n}", rows=rows) for n in (1, 3))
    assert one == two
    assert [row["answers"] for row in one["rows"]] == [["reads", "writes"], ["of"], ["the"]]
    drawn = [measured(finished, tmp_path, *keys, "decoding=sample", f"job.batch_size={n}", rows=rows) for n in (2, 3)]
    assert drawn[0] == drawn[1]
    assert [row["text"] for row in drawn[0]["rows"]] != [row["text"] for row in one["rows"]]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["job.questions=nowhere.jsonl"], "job.questions=nowhere.jsonl cannot be read"),
        (["job.shots=2"], "job.shots=2: means nothing without job.questions"),
        (["job.questions={}", "job.split=test"], "job.split=test: there is no split"),
        (["job.questions={}", "job.shots=3"], "job.shots=3, and for the question of line 1 there are 1"),
        (["job.questions={}"], "line 1: there are no choices"),
        (["job.questions={}", "job.score=generation", "job.rows=true"], "name it, out="),
        (["job.questions={}", "job.score=generation", "job.examples=nowhere"], "job.examples=nowhere cannot"),
    ],
)
def test_errors_of_the_command(finished: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    path = str(written(tmp_path / "q.jsonl", rows))
    given = [override.format(path) for override in overrides]
    generation = [] if len(given) != 2 or "shots=3" not in given[1] else ["job.score=generation"]
    with pytest.raises(UserError) as error:
        evaluate(plan("job=evaluate", f"ckpt={finished}", "trainer=cpu", *given, *generation))
    assert message in str(error.value)


@pytest.mark.slow
def test_two_devices_give_what_one_gives(finished: Path, tmp_path: Path) -> None:
    one = measured(finished, tmp_path, "job.shots=2", "job.batch_size=2")
    out = tmp_path / "two.json"
    names = ["job=evaluate", f"ckpt={finished}", f"job.questions={tmp_path / 'questions.jsonl'}", f"out={out}"]
    more = ["job.rows=true", "job.shots=2", "job.batch_size=2", "trainer=ddp_sim", "trainer.devices=2"]
    done = run(*names, *more)
    assert done.returncode == 0, done.stderr
    assert "5 questions, 2 shots" in " ".join(done.stdout.split())
    same(json.loads(out.read_text()), one)
