"""Summaries of docstrings from a run that was pretrained on Python's documentation, beside the same from nothing.

    python benchmarks/pretrained_summaries.py [--pretrain 3000] [--steps 1300] [--seeds 3] [--together] [--run RUN]

One encoder-decoder is pretrained by denoising (`experiment=pretrain_denoise`). Then `experiment=summarize` trains, with
its tokenizer and size, from these weights and from random ones, for as many steps, seed by seed; with `--together` both
at once, a core each. ROUGE of the test split, with the checkpoint that was best on validation.
"""

from __future__ import annotations

import argparse
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from measure import head, median, ours, table

MODEL = ["model.prenorm=true", "model.copy_init=true"]
SCORES = ("rougeL", "rouge1", "rouge2", "loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain", type=int, default=3000, help="steps of pretraining")
    parser.add_argument("--steps", type=int, default=1300, help="of fine-tuning, on both sides")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--together", action="store_true", help="both sides at once, a core each")
    parser.add_argument("--run", type=Path, help="a run that was pretrained so before, instead of a new one")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = ["trainer=cpu", "trainer.matmul_precision=medium", "callback.samples.prompts=[]"]
        pretrained = options.run.resolve() if options.run else folder / "pretrained"
        if options.run is None:
            done, told = ours(
                pretrained,
                *("experiment=pretrain_denoise", "tokenizer=wordpiece", *MODEL, *common),
                *(f"paths.cache_dir={folder / 'cache'}", f"max_steps={options.pretrain}"),
                f"validate_every={options.pretrain}",
            )
            print(f"pretrained: {done.seconds:.0f} s, validation loss {told['val/loss']:.3f}", flush=True)
        for seed in range(1, options.seeds + 1):
            sides = [
                [
                    *("experiment=summarize", "tokenizer=pretrained", f"tokenizer.path={pretrained}/tokenizer.json"),
                    *(*common, f"max_steps={options.steps}", f"validate_every={options.steps // 2}", f"seed={seed}"),
                    "model.max_length=128",  # as the run's, though the texts are shorter
                    *(f"paths.cache_dir={folder / side}_cache", *more),
                ]
                for side, more in (("from_run", [f"init_from={pretrained}"]), ("from_nothing", []))
            ]
            workers = len(sides) if options.together else 1
            with ThreadPoolExecutor(workers) as both:
                results = [
                    both.submit(
                        ours,
                        folder / f"{number}_{seed}",
                        *overrides,
                        prefix=["taskset", "-c", str(number)] if options.together else [],
                        **({"OMP_NUM_THREADS": "1"} if options.together else {}),
                    )
                    for number, overrides in enumerate(sides)
                ]
                told = [result.result()[1] for result in results]
            rows.append([side[f"test/{score}"] for score in SCORES for side in told])
            print(rows[-1], flush=True)
    print(head("Summaries of docstrings, pretrained and not"))
    shown = [(str(seed), *(f"{x:.2f}" for x in row)) for seed, row in enumerate(rows, 1)]
    shown.append(("median", *(f"**{median(list(column)):.2f}**" for column in zip(*rows, strict=True))))
    columns = [name for score in SCORES for name in (score, f"{score} from nothing")]
    print(table(("seed", *columns), shown))


if __name__ == "__main__":
    main()
