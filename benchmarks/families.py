"""Each model family against Transformers' model of the same size under the Hugging Face Trainer, on pydocs.

    python benchmarks/families.py [--minutes 3] [--families bert t5 bart gpt2]

lmexp trains for so many minutes; then Transformers' model, of as many parameters, for as many steps on as many tokens
each, with AdamW at the best of three rates (pilots of a tenth of the steps), linear decay and warm-up. Causal and
masked LM use the library's own collator, spans and denoising ours on both sides. No dropout on either side. Both are
validated on the same batches: the whole validation split, with the same noise.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import ROOT, head, ours, run, table

sys.path.insert(0, str(ROOT))
from lmexp.contracts import IGNORE_INDEX

RATES = (5e-4, 1e-3, 2e-3)
NO_DROPOUT = ["model.dropout=0.0"]
FAMILIES = {
    "bert": ["experiment=pretrain_mlm", "model=bert", *NO_DROPOUT, "model.attention_dropout=0.0"],
    "t5": ["experiment=pretrain_span", *NO_DROPOUT],
    "bart": ["experiment=pretrain_denoise", *NO_DROPOUT],
    "gpt2": ["experiment=pretrain", "model=gpt", "batch_size=16"],
}
BLOCK, BATCH = 128, 16


def theirs(family: str, vocab_size: int) -> Any:
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
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return hf.BertForMaskedLM(config)
    if family == "t5":
        config = hf.T5Config(
            vocab_size=vocab_size, d_model=128, d_kv=32, d_ff=512, num_layers=3, num_heads=4, dropout_rate=0.0
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
            dropout=0.0,
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
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
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


def side(family: str, steps: int, cache: Path) -> dict[str, float]:
    """Their best pilot's rate, then the whole training: validation loss and milliseconds a step."""
    import transformers as hf

    from lmexp.job.check import check
    from lmexp.job.train import prepare_data, quiet_libraries
    from lmexp.run.terminal import Terminal
    from tests.runs import plan

    quiet_libraries()
    torch.set_num_threads(2)
    cfg = plan(*FAMILIES[family], "trainer=cpu", f"paths.cache_dir={cache}").config
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

    def trained(rate: float, n: int) -> tuple[Any, list[float]]:
        torch.manual_seed(1)
        model = theirs(family, tokenizer.vocab_size)
        times: list[float] = []

        class Clock(hf.TrainerCallback):
            def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
                times.append(time.perf_counter())

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
            hf.Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[Clock()]).train()
        return model.eval(), times

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

    pilots = {rate: validated(trained(rate, max(50, steps // 10))[0]) for rate in RATES}
    best = min(pilots, key=lambda rate: pilots[rate])
    model, times = trained(best, steps)
    first = len(times) // 10
    step = 1000 * (times[-1] - times[first]) / (len(times) - 1 - first)
    n = sum(p.numel() for p in model.parameters())
    return {"loss": validated(model), "step_ms": step, "rate": best, "parameters": n}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3, help="how long lmexp trains")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--steps", type=int, default=20_000, help="a bound on the steps; the rate falls to its end")
    parser.add_argument("--side", choices=list(FAMILIES), help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(side(options.side, options.steps, options.cache)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = folder / "cache"
        for family in options.families:
            common = [*FAMILIES[family], "trainer=cpu", f"paths.cache_dir={cache}", "callback.samples.prompts=[]"]
            _, timing = ours(
                folder / f"{family}_timing", *common, "max_steps=40", "validate_every=40", "data.validation_blocks=4"
            )
            steps = min(options.steps, int(60_000 * options.minutes / timing["speed/mean_step_ms"]))
            _, mine = ours(folder / family, *common, f"max_steps={steps}", f"validate_every={steps}")
            done = run([sys.executable, __file__, "--side", family, "--steps", str(steps), "--cache", str(cache)])
            other = json.loads(done.lines[-1][1])
            speed = other["step_ms"] / mine["speed/mean_step_ms"]
            sizes = (f"{mine['parameters'] / 1e6:.2f}", f"{other['parameters'] / 1e6:.2f}")
            losses = (f"{mine['val/loss']:.4f}", f"{other['loss']:.4f}", f"{other['rate']:g}")
            times = (f"{mine['speed/mean_step_ms']:.1f}", f"{other['step_ms']:.1f}", f"**{speed:.2f}**")
            rows.append((family, str(steps), *sizes, *losses, *times))
            print(rows[-1], flush=True)
    print(head("Each family against Transformers and its Trainer"))
    columns = (
        "family",
        "steps",
        "M parameters",
        "theirs",
        "validation loss",
        "theirs",
        "their rate",
        "ms a step",
        "theirs",
    )
    print(table((*columns, "tokens/s, lmexp to theirs"), rows))


if __name__ == "__main__":
    main()
