"""What translation language modelling teaches that masked language modelling in two languages does not.

    python benchmarks/translation_lm.py --data MULTI30K [--steps 2000]

MULTI30K holds train.en, train.de, val.en and val.de, sentences line by line. Runs of the same encoder, tokenizer,
samples in a batch and steps: translation LM (`use=pairs`), masked LM alone (`use=languages`), and both by turns, a
third of the samples being pairs. All hide 40 % of the tokens: with the 15 % of XLM, what is left of a short sentence
tells most of what is hidden, and so few steps do not teach to look beside it. A tested sentence has 15 % of its words
hidden.

1. Accuracy on hidden words of German validation sentences beside the English sentence, and beside another one.
2. How often the nearest German sentence, by the cosine of mean hidden states, is the translation of the English one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import ROOT, head, ours, table

sys.path.insert(0, str(ROOT))
from lmexp.job.restore import restore
from lmexp.objective.noise import generator, word_edges

LANGUAGES = ("en", "de")
USES = {"pairs": "translation LM", "both": "masked and translation LM", "languages": "masked LM alone"}


def load(run: Path) -> tuple[Any, Any]:
    """The model and the tokenizer of a run's last checkpoint."""
    from tests.runs import plan

    restored = restore(plan("job=evaluate", f"ckpt={run / 'checkpoints' / 'last.ckpt'}", "trainer=cpu"), 1)
    return restored.task.model.eval(), restored.tokenizer


def padded(rows: list[list[int]], languages: list[list[int]], positions: list[list[int]]) -> dict[str, torch.Tensor]:
    """Rows of one text each as inputs of the model."""
    width = max(map(len, rows))
    inputs = {name: torch.zeros(len(rows), width, dtype=torch.int64) for name in ("tokens", "languages", "positions")}
    inputs["documents"] = torch.full((len(rows), width), -1)
    for r, row in enumerate(rows):
        inputs["documents"][r, : len(row)] = 0
        for name, values in (("tokens", row), ("languages", languages[r]), ("positions", positions[r])):
            inputs[name][r, : len(row)] = torch.tensor(values)
    return inputs


@torch.no_grad()
def word_accuracy(model: Any, tokenizer: Any, english: list[list[int]], german: list[list[int]]) -> tuple[float, int]:
    """Share of the hidden German words (15 % of a sentence, at least one) told with all their tokens; how many."""
    cls, sep, mask = (tokenizer.roles[role] for role in ("cls", "sep", "mask"))
    begins, ends = word_edges(tokenizer)
    right = total = 0
    for first in range(0, len(german), 128):
        rows, languages, positions, hidden = [], [], [], []
        for i in range(first, min(first + 128, len(german))):
            a, b = english[i], np.array(german[i])
            word = np.concatenate(([0], (~(begins[b[1:]] & ends[b[:-1]])).cumsum()))
            n_words = int(word[-1]) + 1
            chosen = generator(0, i).choice(n_words, max(1, round(0.15 * n_words)), replace=False)
            noised = np.where(np.isin(word, chosen), mask, b)
            rows.append([cls, *a, sep, *noised.tolist(), sep])
            languages.append([0] * (len(a) + 2) + [1] * (len(b) + 1))
            positions.append([*range(len(a) + 2), *range(len(b) + 1)])
            hidden.append([len(a) + 2 + np.flatnonzero(word == w) for w in chosen])
        told = model.head(model(**padded(rows, languages, positions))).argmax(-1).numpy()
        for r, places in enumerate(hidden):
            offset = len(english[first + r]) + 2
            for at in places:
                right += bool((told[r, at] == np.array(german[first + r])[at - offset]).all())
                total += 1
    return right / total, total


@torch.no_grad()
def sentence_vectors(model: Any, tokenizer: Any, sentences: list[list[int]], language: int) -> torch.Tensor:
    """Mean hidden state of each sentence's own tokens, of length 1."""
    cls, sep = tokenizer.roles["cls"], tokenizer.roles["sep"]
    vectors = []
    for first in range(0, len(sentences), 256):
        rows = [[cls, *s, sep] for s in sentences[first : first + 256]]
        inputs = padded(rows, [[language] * len(r) for r in rows], [list(range(len(r))) for r in rows])
        states = model(**inputs)
        own = (inputs["documents"] == 0) & (inputs["tokens"] != cls) & (inputs["tokens"] != sep)
        mean = (states * own[..., None]).sum(1) / own.sum(1, keepdim=True)
        vectors.append(mean / mean.norm(dim=1, keepdim=True))
    return torch.cat(vectors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with train.en, train.de, val.en, val.de")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of each run")
    parser.add_argument("--use", nargs="+", choices=list(USES), default=list(USES), help="which of the runs")
    parser.add_argument("--runs", type=Path, help="keep the runs here, and go on from them")
    parser.add_argument("overrides", nargs="*", help="further overrides for all runs")
    options = parser.parse_args()
    data = options.data.resolve()
    files = {
        split: {x: str(data / f"{name}.{x}") for x in LANGUAGES}
        for split, name in (("train", "train"), ("validation", "val"))
    }
    corpus = [
        f"data.corpus.{split}={json.dumps(paths).replace(' ', '').replace(chr(34), '')}"
        for split, paths in files.items()
    ]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = options.runs.resolve() if options.runs else Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        for use in options.use:
            title = USES[use]
            run = folder / use
            common = ["experiment=pretrain_xlm", "data=parallel_files", "data.corpus.languages=[en,de]", *corpus]
            common += [f"data.corpus.use={use}", f"paths.cache_dir={folder / 'cache'}", "trainer=cpu", "resume=auto"]
            common += ["model.n_languages=2", f"max_steps={options.steps}", f"validate_every={options.steps}"]
            common += ["data.block_size=96", "batch_size=48", "objective.rate=0.4"]
            _, metrics = ours(run, *common, *options.overrides)
            model, tokenizer = load(run)
            english, german = (
                [ids.tolist() for ids in tokenizer.encode((data / f"val.{x}").read_text().splitlines())]
                for x in LANGUAGES
            )
            shifted = english[len(english) // 2 :] + english[: len(english) // 2]
            beside, n_words = word_accuracy(model, tokenizer, english, german)
            unrelated, _ = word_accuracy(model, tokenizer, shifted, german)
            a, b = sentence_vectors(model, tokenizer, english, 0), sentence_vectors(model, tokenizer, german, 1)
            found = ((a @ b.T).argmax(1) == torch.arange(len(a))).double().mean().item()
            cost = (f"{metrics['seconds']:.0f}", f"{metrics['tokens']:,.0f}")
            rows.append(
                (title, *cost, f"{beside:.1%}", f"{unrelated:.1%}", f"{beside / unrelated:.2f}", f"{found:.1%}")
            )
            print(rows[-1], flush=True)
    print(head("Translation language modelling on Multi30k, English and German"))
    columns = ("trained with", "seconds", "tokens read", "hidden German words told beside the English sentence")
    print(table((*columns, "beside another", "ratio", "German sentence found by its English one"), rows))
    print(f"\n{options.steps} steps of each; {n_words} hidden words in {len(german)} sentences.")


if __name__ == "__main__":
    main()
