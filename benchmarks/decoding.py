"""Greedy and beam decoding against Transformers' `generate` on the same weights.

    python benchmarks/decoding.py [--rounds 7]

A decoder (GPT-2's form) and an encoder-decoder (T5's), random weights, 8 prompts of 8 to 32 tokens, 48 new tokens each.
Both sides in one process, in turn; the same texts come out of both, or the benchmark stops.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measure import ROOT, head, median, table

sys.path.insert(0, str(ROOT))
from lmexp.decoding.beam import Beam
from lmexp.decoding.generate import Sampling, generate
from lmexp.huggingface.architecture import to_ours
from lmexp.huggingface.gpt2 import GPT2
from lmexp.huggingface.t5 import T5
from lmexp.model.gpt import GPTConfig
from lmexp.model.t5 import T5Config

VOCAB, EOS, NEW, BATCH = 4096, 2, 48, 8


def models() -> dict[str, tuple[Any, Any]]:
    """Ours and theirs with the same weights."""
    import transformers as hf

    hf.logging.set_verbosity_error()
    decoder = hf.GPT2Config(
        vocab_size=VOCAB, n_positions=128, n_embd=128, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=EOS
    )
    both = hf.T5Config(
        vocab_size=VOCAB, d_model=128, d_kv=32, d_ff=512, num_layers=3, num_heads=4, decoder_start_token_id=0
    )
    made = {}
    for name, their, kind, ours in (
        ("decoder", hf.GPT2LMHeadModel(decoder), GPT2(), GPTConfig),
        ("encoder-decoder", hf.T5ForConditionalGeneration(both), T5(), T5Config),
    ):
        for p in their.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.15)
        settings = {k: v for k, v in kind.settings(their.config.to_dict()).items() if k != "_target_"}
        model = ours(**settings).build(VOCAB)
        model.load_state_dict(to_ours(kind, model, their.state_dict(), VOCAB).weights, strict=False)
        made[name] = (model.eval(), their.eval())
    return made


def theirs(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """The new tokens of their `generate`."""
    width = max(map(len, prompts))
    ids, mask = torch.zeros(len(prompts), width, dtype=torch.int64), torch.zeros(len(prompts), width, dtype=torch.int64)
    left = not model.config.is_encoder_decoder
    for row, prompt in enumerate(prompts):
        at = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        ids[row, at], mask[row, at] = torch.tensor(prompt), 1
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, eos_token_id=EOS, pad_token_id=0, **options
    )
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in out[:, width if left else 1 :].tolist()]


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    rng = np.random.default_rng(0)
    rows = []
    for name, (model, their) in models().items():
        prompts = [rng.integers(3, VOCAB, size=n).tolist() for n in rng.integers(8, 33, size=BATCH)]
        for how, ours, given in (
            ("greedy", Sampling(temperature=0, max_new_tokens=NEW), {"num_beams": 1}),
            ("beam 4", Beam(beams=4, max_new_tokens=NEW), {"num_beams": 4}),
        ):
            seconds: list[tuple[float, float]] = []
            for round_ in range(options.rounds + 1):
                mine, texts = timed(lambda ours=ours: generate(model, prompts, ours, EOS, VOCAB))  # noqa: B023
                other, expected = timed(lambda given=given: theirs(their, prompts, **given))  # noqa: B023
                if texts != expected:
                    sys.exit(f"{name}, {how}: the texts differ")
                if round_:  # the first warms up
                    seconds.append((mine, other))
            n = sum(map(len, texts))
            mine, other = (median([pair[side] for pair in seconds]) for side in (0, 1))
            ratio = median([b / a for a, b in seconds])
            rows.append((name, how, f"{n / mine:,.0f}", f"{n / other:,.0f}", f"**{ratio:.2f}**"))
            print(rows[-1], flush=True)
    print(head("Decoding, 8 prompts at once"))
    print(table(("model", "how", "tokens/s", "Transformers", "lmexp to Transformers"), rows))


if __name__ == "__main__":
    main()
