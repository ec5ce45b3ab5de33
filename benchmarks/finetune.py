"""SST-2 from a Hugging Face encoder's weights: lmexp beside Transformers' Trainer, and lmexp from nothing.

    python benchmarks/finetune.py --encoder FOLDER --sst2 FOLDER [--seeds 3] [--epochs 3] [--together]

`--sst2` holds train.tsv and dev.tsv (label, tab, sentence). Both sides: the same weights, epochs, batch, AdamW, rate
and linear decay, validated after each epoch, each as a whole process; they take turns, seed by seed, or, with
`--together`, run at once on a core each. Accuracy on dev after the last epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from measure import head, median, ours, run, table

BATCH, RATE, DECAY = 32, 1e-4, 0.01


def rows_of(path: Path) -> list[tuple[int, str]]:
    """(label, sentence) of each line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(int(label), text) for label, text in (line.split("\t", 1) for line in lines if line)]


def side(encoder: str, sst2: Path, seed: int, epochs: int) -> float:
    """Accuracy of Transformers' model after its Trainer."""
    import datasets
    import transformers as hf

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    tokenizer = hf.AutoTokenizer.from_pretrained(encoder)
    sets = {}
    for split in ("train", "dev"):
        rows = rows_of(sst2 / f"{split}.tsv")
        plain = datasets.Dataset.from_dict({"label": [y for y, _ in rows], "text": [t for _, t in rows]})
        sets[split] = plain.map(
            lambda batch: tokenizer(batch["text"], truncation=True, max_length=128), batched=True, remove_columns="text"
        )
    hf.set_seed(seed)
    model = hf.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    with tempfile.TemporaryDirectory() as folder:
        arguments = hf.TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=64,
            learning_rate=RATE,
            weight_decay=DECAY,
            lr_scheduler_type="linear",
            eval_strategy="epoch",
            save_strategy="epoch",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        )
        trainer = hf.Trainer(
            model,
            arguments,
            train_dataset=sets["train"],
            eval_dataset=sets["dev"],
            data_collator=hf.DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda told: {"accuracy": float((told[0].argmax(-1) == told[1]).mean())},
        )
        trainer.train()
    return [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="a folder with a BERT, its tokenizer and config.json")
    parser.add_argument("--sst2", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--together", action="store_true", help="both at once, a core each")
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        print(json.dumps(side(options.encoder, options.sst2, options.side, options.epochs)))
        return
    steps = options.epochs * (len(rows_of(options.sst2 / "train.tsv")) // BATCH)
    corpus = (
        f"data.corpus={{train: {options.sst2}/train.tsv, validation: {options.sst2}/dev.tsv, text: sentence, "
        "columns: [label, sentence], labels: [negative, positive]}"
    )
    data = ["data=labelled_files", "data.block_size=128", corpus, "trainer=cpu", "trainer.matmul_precision=medium"]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in range(1, options.seeds + 1):
            tuned = [
                *("experiment=finetune_hf_sentiment", *data, f"init_from={options.encoder}", f"seed={seed}"),
                *(f"batch_size={BATCH}", f"optimizer.lr={RATE}", f"optimizer.weight_decay={DECAY}"),
                *(
                    f"max_steps={steps}",
                    f"validate_every={steps // options.epochs}",
                    f"paths.cache_dir={folder / str(seed)}",
                ),
            ]
            command = [sys.executable, __file__, "--encoder", options.encoder, "--sst2", str(options.sst2)]
            command += ["--side", str(seed), "--epochs", str(options.epochs)]
            if options.together:
                with ThreadPoolExecutor() as both:
                    alone = {"OMP_NUM_THREADS": "1"}
                    first = both.submit(ours, folder / f"tuned{seed}", *tuned, prefix=["taskset", "-c", "1"], **alone)
                    second = both.submit(run, ["taskset", "-c", "0", *command], **alone)
                    (done, mine), theirs = first.result(), second.result()
            else:
                done, mine = ours(folder / f"tuned{seed}", *tuned)
                theirs = run(command)
            scratch, plain = ours(
                folder / f"scratch{seed}",
                *("experiment=sentiment_sst2", *data, f"seed={seed}", f"paths.cache_dir={folder / 'cache'}"),
            )
            row = (mine["val/accuracy"], float(theirs.lines[-1][1]), done.seconds, theirs.seconds)
            rows.append((*row, plain["val/accuracy"], scratch.seconds))
            print(rows[-1], flush=True)
    print(head("SST-2 from an encoder's weights"))
    cells = [
        (str(seed), f"{a:.2%}", f"{b:.2%}", f"{s:.0f}", f"{t:.0f}", f"**{s / t:.2f}**", f"{c:.2%}", f"{u:.0f}")
        for seed, (a, b, s, t, c, u) in enumerate(rows, 1)
    ]
    a, b, s, t, c, u = (median(column) for column in zip(*rows, strict=True))
    ratio = median([row[2] / row[3] for row in rows])
    cells.append(("median", f"{a:.2%}", f"{b:.2%}", f"{s:.0f}", f"{t:.0f}", f"**{ratio:.2f}**", f"{c:.2%}", f"{u:.0f}"))
    columns = ("seed", "accuracy", "Trainer's", "seconds", "Trainer's", "ratio", "from nothing", "seconds")
    print(table(columns, cells))


if __name__ == "__main__":
    main()
