"""Multi30k, English to German, from nothing: lmexp beside a Marian model of the same size under Seq2SeqTrainer.

    python benchmarks/translation.py --multi30k FOLDER [--minutes 20] [--seed 1] [--together]

`--multi30k` holds train.en, train.de, val.en and val.de. Both sides train for the same time, with the same tokenizer
(lmexp's), sentences a batch and label smoothing. lmexp's is the recipe as it is, ended by `max_time`; Transformers' has
Marian's dropout, the best of three rates (pilots of a twentieth of the steps), and bf16 if that is faster here. Then
all validation sentences are decoded with beam 4 and the recipe's length penalty, and scored by sacrebleu. With
`--together` both train at the same time, each on one core, for twice as long.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import ROOT, head, ours, table

sys.path.insert(0, str(ROOT))

BATCH, SMOOTHING, LONGEST = 64, 0.1, 64
LENGTH_PENALTY = 1.5  # the recipe's
DROPOUT = 0.1  # of Marian
RATES = (5e-4, 1e-3, 2e-3)
PILOT_STEPS = 40


def overrides(folder: Path, cache: Path) -> list[str]:
    """Of lmexp's run."""
    files = {s: f"{{en: {folder}/{n}.en, de: {folder}/{n}.de}}" for s, n in (("train", "train"), ("validation", "val"))}
    return [
        *("experiment=translate_multi30k", "data=parallel_files"),
        *(f"data.corpus.{split}={source}" for split, source in files.items()),
        *("trainer=cpu", "trainer.matmul_precision=medium", f"paths.cache_dir={cache}", f"batch_size={BATCH}"),
        *(f"task.label_smoothing={SMOOTHING}", "callback.answers.examples=null"),
    ]


def side(folder: Path, tokenizer_file: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Transformers' Marian: its parameters, rate, steps, seconds of training and BLEU."""
    import datasets
    import sacrebleu
    import transformers as hf

    from lmexp.tokenizer.tokenizer import Tokenizer

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    shared: Any = Tokenizer.load(tokenizer_file)
    eos = shared.decode([shared.eos_id])
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=shared.backend, eos_token=eos, pad_token="<pad>")
    pad = len(tokenizer) - 1
    assert tokenizer.pad_token_id == pad
    texts = {
        name: (folder / name).read_text(encoding="utf-8").splitlines()
        for name in ("train.en", "train.de", "val.en", "val.de")
    }

    def ids(names: list[str]) -> list[list[int]]:
        return [[*row.tolist()[: LONGEST - 1], shared.eos_id] for row in shared.encode(names)]

    train = datasets.Dataset.from_dict({"input_ids": ids(texts["train.en"]), "labels": ids(texts["train.de"])})

    def model_of() -> Any:
        torch.manual_seed(seed)
        return hf.MarianMTModel(
            hf.MarianConfig(
                vocab_size=len(tokenizer),
                d_model=128,
                encoder_layers=3,
                decoder_layers=3,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=512,
                decoder_ffn_dim=512,
                max_position_embeddings=LONGEST,
                dropout=DROPOUT,
                attention_dropout=0.0,
                activation_dropout=0.0,
                activation_function="relu",
                scale_embedding=True,
                share_encoder_decoder_embeddings=True,
                pad_token_id=pad,
                eos_token_id=shared.eos_id,
                bos_token_id=shared.eos_id,
                decoder_start_token_id=pad,
                forced_eos_token_id=None,
            )
        )

    def trained(rate: float, steps: int, bf16: bool) -> tuple[Any, float, float]:
        model = model_of()
        with tempfile.TemporaryDirectory() as out:
            arguments = hf.Seq2SeqTrainingArguments(
                output_dir=out,
                per_device_train_batch_size=BATCH,
                max_steps=steps,
                seed=41 + seed,
                learning_rate=rate,
                warmup_steps=steps // 10,
                label_smoothing_factor=SMOOTHING,
                train_sampling_strategy="group_by_length",
                logging_steps=20,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                bf16=bf16,
            )
            collator = hf.DataCollatorForSeq2Seq(tokenizer, model=model)
            trainer = hf.Seq2SeqTrainer(model, arguments, train_dataset=train, data_collator=collator)
            start = time.perf_counter()
            trainer.train()
            spent = time.perf_counter() - start
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return model.eval(), spent, sum(losses[-2:]) / len(losses[-2:])

    trained(RATES[0], PILOT_STEPS, False)  # the first steps are slow
    paces = {bf16: trained(RATES[0], PILOT_STEPS, bf16)[1] / PILOT_STEPS for bf16 in (False, True)}
    bf16 = paces[True] < paces[False]
    short = max(60, int(seconds / paces[bf16]) // 20)
    pilots = {rate: trained(rate, short, bf16)[1:] for rate in RATES}
    rate = min(RATES, key=lambda r: pilots[r][1])
    steps = int(seconds / min(spent / short for spent, _ in pilots.values()))  # not of the first steps, which are slow
    model, spent, _ = trained(rate, steps, bf16)
    outputs: list[str] = []
    sources = ids(texts["val.en"])
    for first in range(0, len(sources), 64):
        batch = tokenizer.pad({"input_ids": sources[first : first + 64]}, return_tensors="pt")
        written = model.generate(
            **batch, num_beams=4, max_new_tokens=LONGEST, do_sample=False, length_penalty=LENGTH_PENALTY
        )
        rows = [[i for i in row if i != pad] for row in written.tolist()]
        outputs += [shared.decode(row, skip_special=True).strip() for row in rows]
    return {
        "bleu": sacrebleu.corpus_bleu(outputs, [texts["val.de"]]).score,
        "rate": f"{rate:g}{', bf16' if bf16 else ''}",
        "steps": steps,
        "seconds": spent,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--multi30k", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20, help="training on two cores")
    parser.add_argument("--seed", type=int, default=1, help="of both sides")
    parser.add_argument("--together", action="store_true", help="both at once, a core each, twice as long")
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    seconds = 60 * options.minutes * (2 if options.together else 1)
    if options.side:
        print(json.dumps(side(options.multi30k, options.side, seconds, options.seed)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = [*overrides(options.multi30k.resolve(), folder / "cache"), f"seed={options.seed}"]
        first, second = ([["taskset", "-c", str(core)] for core in (0, 1)]) if options.together else ([], [])
        threads = {"OMP_NUM_THREADS": "1"} if options.together else {}
        quick = ["callback.answers.examples=1", "decoding=greedy"]
        pilot = ours(folder / "pilot", *common, *quick, *(f"{k}={v}" for k, v in pace(PILOT_STEPS).items()), **threads)
        steps = int(1000 * seconds / pilot[1]["speed/mean_step_ms"])
        command = [*second, sys.executable, __file__, "--multi30k", str(options.multi30k), "--minutes"]
        command += [str(seconds / 60), "--side", str(folder / "pilot" / "tokenizer.json"), "--seed", str(options.seed)]
        other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **threads})
        if not options.together:
            told = other.communicate()[0]
        # the other core's work slows it down: ended by the clock, before the steps that its pace alone would make
        length = (*(f"{k}={v}" for k, v in pace(steps).items()), f"max_time={seconds}s")
        done = ours(folder / "run", *common, *length, prefix=first, **threads)
        if options.together:
            told = other.communicate()[0]
    theirs, mine = json.loads(told.splitlines()[-1]), done[1]
    trained = mine["steps"] * mine["speed/mean_step_ms"] / 1000  # without validation, as theirs
    print(head("Multi30k, English to German"))
    rows = [
        ("lmexp", mine["parameters"], mine["steps"], trained, mine["val/bleu"], "Muon"),
        ("Marian, Seq2SeqTrainer", *(theirs[k] for k in ("parameters", "steps", "seconds", "bleu", "rate"))),
    ]
    cells = [(n, f"{p / 1e6:.2f}", str(s), f"{t:.0f}", f"**{b:.1f}**", str(r)) for n, p, s, t, b, r in rows]
    print(table(("", "M parameters", "steps", "seconds of training", "BLEU of validation, beam 4", "rate"), cells))


def pace(steps: int) -> dict[str, int]:
    """How long lmexp trains."""
    return {"max_steps": steps, "validate_every": steps}


if __name__ == "__main__":
    main()
