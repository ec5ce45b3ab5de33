"""Each model family against Transformers' model of the same size under the Hugging Face Trainer, on pydocs.

    python benchmarks/families.py [--minutes 3] [--families bert t5 bart gpt2] [--dropout P]
        [--speed-only | --loss-only --steps N]

lmexp trains for so many minutes; then Transformers' model, of as many parameters, for as many steps on as many tokens
each, with AdamW at the best of three rates (pilots of a twentieth of the steps), linear decay and warm-up. Causal and
masked LM use the library's own collator, spans and denoising ours on both sides. Dropout is the same on both sides, by
default none. Both are validated on the same batches: the whole validation split, with the same noise. Speed is compared
by turns of a few seconds, one side stopped while the other runs, as that of a machine drifts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import ROOT, Ticks, head, in_turn, median, ours, run, table

sys.path.insert(0, str(ROOT))
from lmexp.contracts import IGNORE_INDEX

RATES = (5e-4, 1e-3, 2e-3)
FAMILIES = {
    "bert": ["experiment=pretrain_mlm", "model=bert", "model.dropout=0.0", "model.attention_dropout=0.0"],
    "t5": ["experiment=pretrain_span", "model.dropout=0.0"],
    "bart": ["experiment=pretrain_denoise", "model.dropout=0.0"],
    "gpt2": ["experiment=pretrain", "model=gpt", "batch_size=16", "model.dropout=0.0"],
}
BLOCK, BATCH = 128, 16


def settings(family: str, dropout: float) -> list[str]:
    """Overrides of lmexp's run."""
    return [o.replace("dropout=0.0", f"dropout={dropout}") for o in FAMILIES[family]]


def theirs(family: str, vocab_size: int, dropout: float) -> Any:
    """Transformers' model of the size of ours (conf/model/bert, t5, transformer, gpt)."""
    import transformers as hf

    if family == "bert":
        config = hf.BertConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            max_position_embeddings=BLOCK,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        return hf.BertForMaskedLM(config)
    if family == "t5":
        config = hf.T5Config(
            vocab_size=vocab_size, d_model=128, d_kv=32, d_ff=512, num_layers=3, num_heads=4, dropout_rate=dropout
        )
        return hf.T5ForConditionalGeneration(config)
    if family == "bart":
        config = hf.BartConfig(
            vocab_size=vocab_size,
            d_model=128,
            encoder_layers=3,
            decoder_layers=3,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=512,
            decoder_ffn_dim=512,
            max_position_embeddings=BLOCK,
            dropout=dropout,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            decoder_start_token_id=0,
        )
        return hf.BartForConditionalGeneration(config)
    config = hf.GPT2Config(
        vocab_size=vocab_size,
        n_positions=BLOCK,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    return hf.GPT2LMHeadModel(config)


def as_theirs(batch: Any) -> dict[str, torch.Tensor]:
    """A batch of ours as keyword arguments of their models; labels for each position."""
    inputs, labels = batch["inputs"], batch["labels"]
    out = {"input_ids": inputs["tokens"]}
    if "documents" in inputs:
        out["attention_mask"] = (inputs["documents"] >= 0).long()
    if "decoder_tokens" in inputs:
        out["decoder_input_ids"] = inputs["decoder_tokens"]
    if "scored" in batch:
        real = labels != IGNORE_INDEX
        rows = torch.arange(len(labels))[:, None].expand_as(labels)
        whole = torch.full_like(inputs["tokens"], IGNORE_INDEX)
        whole[rows[real], batch["scored"][real]] = labels[real]
        labels = whole
    return out | {"labels": labels}


def side(
    family: str, steps: int, cache: Path, dropout: float, ticks: str | None, rates: list[float]
) -> dict[str, float]:
    """Their best pilot's rate and, after the whole training with it, the validation loss; or only steps and `Ticks`."""
    import transformers as hf

    from lmexp.job.check import check
    from lmexp.job.train import prepare_data, quiet_libraries
    from lmexp.run.terminal import Terminal
    from tests.runs import plan

    quiet_libraries()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    cfg = plan(*settings(family, dropout), "trainer=cpu", f"paths.cache_dir={cache}").config
    data = prepare_data(cfg, check(cfg, 1), Terminal(quiet=True))
    tokenizer = data.tokenizer
    source = data._train_source()
    collator: Any
    rows: Any
    if family in ("bert", "gpt2"):
        special = {
            role: name for role, name in (("mask", "mask_token"), ("cls", "cls_token")) if role in tokenizer.roles
        }
        spelled = {name: tokenizer.decode([tokenizer.roles[role]]) for role, name in special.items()}
        fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, pad_token="<|endoftext|>", **spelled)
        collator = hf.DataCollatorForLanguageModeling(fast, mlm=family == "bert")
        first = [tokenizer.roles["cls"]] if family == "bert" else []
        last = None if family == "bert" else BLOCK  # the label of the last position is not in the block
        rows = [{"input_ids": [*first, *s.tokens.tolist()][:last]} for s in source.samples(range(steps * BATCH))]
    else:
        recipe = data._recipe(cfg.seed)
        rows = [{"index": i} for i in range(steps * BATCH)]

        def collator(items: list[dict[str, int]]) -> dict[str, torch.Tensor]:
            return as_theirs(recipe(source.samples([item["index"] for item in items])))

    class Clock(hf.TrainerCallback):
        def __init__(self, file: str) -> None:
            self.ticks = Ticks(file)

        def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
            self.ticks.tick()

    def trained(rate: float, n: int) -> Any:
        torch.manual_seed(1)
        model = theirs(family, tokenizer.vocab_size, dropout)
        clocks = [] if ticks is None else [Clock(ticks)]

        with tempfile.TemporaryDirectory() as folder:
            arguments = hf.TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=BATCH,
                max_steps=n,
                learning_rate=rate,
                warmup_steps=n // 10,
                logging_steps=10,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                remove_unused_columns=False,
            )
            hf.Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=clocks).train()
        return model.eval()

    @torch.no_grad()
    def validated(model: Any) -> float:
        nats = count = 0.0
        for batch in data.loader("validation"):
            inputs = as_theirs(batch)
            labels = inputs.pop("labels")
            logits = model(**inputs).logits.flatten(0, 1)
            nats += torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum").item()
            count += int((labels != IGNORE_INDEX).sum())
        return nats / count

    if ticks is not None:
        trained(rates[0], steps)
        return {}
    pilots = {rate: validated(trained(rate, max(50, steps // 20))) for rate in rates}
    best = min(pilots, key=lambda rate: pilots[rate])
    model = trained(best, steps)
    return {"loss": validated(model), "rate": best, "parameters": sum(p.numel() for p in model.parameters())}


def speeds(family: str, cache: Path, folder: Path, dropout: float) -> tuple[list[float], list[float], list[float]]:
    """`in_turn` of ours and theirs."""
    files = [folder / f"{family}_{side}" for side in ("ours", "theirs")]
    steps = 2000  # never reached
    mine = [sys.executable, str(ROOT / "run.py"), *settings(family, dropout), "trainer=cpu"]
    mine += [f"paths.cache_dir={cache}"]
    mine += [f"paths.run_dir={folder / family}_speed", f"max_steps={steps}", f"validate_every={steps}"]
    mine += ["+callback.ticks._target_=measure.Ticks", f"+callback.ticks.file={files[0]}"]
    other = their_command(family, steps, cache, dropout, "--ticks", str(files[1]))
    return in_turn((mine, other), files)


def their_command(family: str, steps: int, cache: Path, dropout: float, *more: str) -> list[str]:
    """`side` as a process of its own."""
    command = [sys.executable, __file__, "--side", family, "--steps", str(steps), "--cache", str(cache)]
    return [*command, "--dropout", str(dropout), *more]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3, help="how long lmexp trains")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--steps", type=int, default=20_000, help="a bound on the steps; the rate falls to its end")
    parser.add_argument("--speed-only", action="store_true", help="compare the steps' times alone")
    parser.add_argument("--loss-only", action="store_true", help="compare the losses alone, after --steps steps")
    parser.add_argument(
        "--dropout", type=float, default=0.0, help="on both sides, of the weights of attention in all but BART"
    )
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="of Transformers' side")
    parser.add_argument("--side", choices=list(FAMILIES), help=argparse.SUPPRESS)
    parser.add_argument("--ticks", help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        told = side(options.side, options.steps, options.cache, options.dropout, options.ticks, options.rates)
        print(json.dumps(told))
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = folder / "cache"
        for family in options.families:
            row: tuple[str, ...] = (family,)
            steps = options.steps
            if not options.loss_only:
                mine_ms, other_ms, ratios = speeds(family, cache, folder, options.dropout)
                low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
                times = (f"{median(mine_ms):.1f}", f"{median(other_ms):.1f}")
                row += (*times, f"**{middle:.2f}**", f"{low:.2f} to {high:.2f}")
                steps = min(options.steps, int(60_000 * options.minutes / median(mine_ms)))
            if not options.speed_only:
                common = [
                    *settings(family, options.dropout),
                    "trainer=cpu",
                    f"paths.cache_dir={cache}",
                    "callback.samples.prompts=[]",
                ]
                _, mine = ours(folder / family, *common, f"max_steps={steps}", f"validate_every={steps}")
                rates = ("--rates", *map(str, options.rates))
                other = json.loads(run(their_command(family, steps, cache, options.dropout, *rates)).lines[-1][1])
                sizes = (f"{mine['parameters'] / 1e6:.2f}", f"{other['parameters'] / 1e6:.2f}")
                row += (str(steps), *sizes, f"{mine['val/loss']:.4f}", f"{other['loss']:.4f}", f"{other['rate']:g}")
            rows.append(row)
            print(row, flush=True)
    print(head("Each family against Transformers and its Trainer"))
    columns: tuple[str, ...] = ("family",)
    if not options.loss_only:
        columns += ("ms a step", "theirs", "tokens/s, lmexp to theirs", "middle half")
    if not options.speed_only:
        columns += ("steps", "M parameters", "theirs", "validation loss", "theirs", "their rate")
    print(table(columns, rows))


if __name__ == "__main__":
    main()
