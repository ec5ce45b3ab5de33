"""What more words in the vocabulary are worth on another domain.

    python benchmarks/new_words.py --text tinyshakespeare.txt [--steps 300]

A model is pretrained on Python's documentation (`experiment=pretrain`), then goes on with the text for as many steps:
with its own vocabulary, and with words of the text added (`tokenizer=extended`), whose rows begin as the means of the
pieces that they replace.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from measure import ROOT, head, ours, run, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="text of another domain")
    parser.add_argument("--steps", type=int, default=300, help="steps of pretraining, and of each adaptation")
    parser.add_argument("--words", type=int, default=1000, help="words to add at most")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        timing = [f"max_steps={options.steps}", f"validate_every={options.steps}", "callback.samples.prompts=[]"]
        common = ["experiment=pretrain", "trainer=cpu", f"paths.cache_dir={folder / 'cache'}", *timing]
        ours(folder / "first", *common)
        text = ["data=files", f"data.corpus.path={options.text.resolve()}", "data.corpus.by=tail"]
        adapted = [*common, *text, f"init_from={folder / 'first'}"]
        kinds = {
            "its own": ["tokenizer=pretrained", f"tokenizer.path={folder / 'first' / 'tokenizer.json'}"],
            "with words of the text": [
                *("tokenizer=extended", f"tokenizer.base={folder / 'first'}"),
                f"tokenizer.n_tokens={options.words}",
            ],
        }
        for number, (title, tokenizer) in enumerate(kinds.items()):
            out = folder / str(number)
            _, metrics = ours(out, *adapted, *tokenizer)
            found = folder / f"{number}.json"
            run([sys.executable, str(ROOT / "run.py"), "job=evaluate", f"ckpt={out}", "trainer=cpu", f"out={found}"])
            report = next((line for line in (out / "run.log").read_text().splitlines() if "validation" in line), "")
            cells = [cell.strip() for cell in report.replace("┃", "│").split("│")]
            values = json.loads(found.read_text())
            rows.append((title, f"{metrics['parameters'] / 1e6:.2f}", cells[5], cells[4], f"{values['tokens']:,}"))
            rows[-1] += (f"{values['validation/bits_per_byte']:.4f}",)
            print(rows[-1], flush=True)
    print(head("More words for another domain"))
    columns = ("vocabulary", "M parameters", "tokens a word", "bytes a token", "validation tokens", "bits per byte")
    print(table(columns, rows))
    print(f"\nAfter {options.steps} steps on Python's documentation and {options.steps} on the text.")


if __name__ == "__main__":
    main()
