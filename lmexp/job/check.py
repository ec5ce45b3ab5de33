"""All that can be wrong with a configuration, found before anything slow and told at once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lmexp.callback.answers import fitted
from lmexp.contracts import Family, ReadsWholeTexts, UserError
from lmexp.data.labelled import is_labelled
from lmexp.data.parted import is_parted
from lmexp.decoding.generate import Sampling
from lmexp.job.build import Parts, accelerator_of, bind_metric, build_node, build_task, precision_of
from lmexp.metric.classification import ClassificationScores
from lmexp.model.auto import AutoModelSettings
from lmexp.objective.classification import Classification
from lmexp.objective.text_to_text import TextToText
from lmexp.objective.translation_lm import TranslationLM

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(max_time: Any) -> float | None:
    """Seconds that `max_time` means: a number of seconds, or 90s, 5m, 2h, 1d; None for null."""
    if max_time is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", str(max_time))
    if match is None or float(match[1]) <= 0:
        raise UserError(f"max_time={max_time}; expected a time such as 90s, 5m, 2h or 1d, or null.")
    return float(match[1]) * _UNITS[match[2] or "s"]


def check(cfg: DictConfig, world_size: int, training: bool = True, classes: dict[str, Any] | None = None) -> Parts:
    """Make the parts of an experiment; raises ONE `UserError` that lists every misfit, each with its fix.

    `training`: also what only a training run needs, its batches, its callbacks, a validation split. `classes`: those of
    a checkpoint (`classes_of`), which then need not be read from its data.
    """
    errors: list[str] = []

    def collect(make: Callable[[], Any]) -> Any:
        try:
            return make()
        except UserError as error:
            errors.append(str(error))
            return None

    for key in sorted(set(cfg) - ROOT_KEYS):
        errors.append(f"{key}={cfg[key]}: no such key; nothing would read it. Leave it out.")
    for key in sorted(set(cfg.trainer) - TRAINER_KEYS):
        errors.append(f"trainer.{key}={cfg.trainer[key]}: no such key; nothing would read it. Leave it out.")
    for key, least in WHOLE.items():
        if key != "batch_size" or cfg.batch_size is not None:
            collect(partial(_whole, key, cfg[key], least))
    if cfg.max_samples is not None:
        collect(lambda: _whole("max_samples", cfg.max_samples, 1))
    collect(lambda: seconds_of(cfg.max_time))
    if cfg.resume not in ("never", "auto"):
        errors.append(f"resume={cfg.resume}; expected never or auto.")
    collect(lambda: check_devices(cfg, world_size))
    if not errors and training:
        if cfg.batch_size is not None:
            collect(lambda: check_division(cfg, world_size))
        elif cfg.trainer.micro_batch_size is not None:
            collect(lambda: _whole("trainer.micro_batch_size", cfg.trainer.micro_batch_size, 1))
        collect(lambda: check_saving(cfg))
    made = {key: collect(partial(build_node, cfg, key)) for key in _PARTS}
    collect(lambda: check_task(cfg, made))
    collect(lambda: check_objective(cfg, made))
    if training:
        collect(lambda: check_batch(cfg, made))
    if not errors and classes is not None:
        made["metric"].bind(**classes)
    elif not errors:
        collect(lambda: bind_metric(made["metric"], made["objective"], made["data"]))
    callbacks = _callbacks(cfg, made, errors, collect) if training else []
    if training and made["data"] is not None and "train" not in made["data"].corpus.splits:
        errors.append("data: its corpus has no training split; name one, data.corpus.train=SPLIT_OR_FILE.")
    if training and made["data"] is not None and "validation" not in made["data"].corpus.splits:
        errors.append(
            "data: its corpus has no validation split; name one, data.corpus.validation=SPLIT_OR_FILE, or give part of "
            "it, data.corpus.validation_fraction=0.05."
        )
    parts = Parts(
        data=made["data"],
        tokenizer=made["tokenizer"],
        model=made["model"],
        objective=made["objective"],
        optimizer=made["optimizer"],
        schedule=made["schedule"],
        sampling=made["decoding"],
        metric=made["metric"],
        callbacks=callbacks,
    )
    if not errors:  # what can only be seen with the parts together; the vocabulary does not matter
        collect(lambda: build_task(cfg, parts, vocab_size=64, device="meta").adapt(cfg.seed))
        last = cfg.max_steps - 1
        collect(lambda: [parts.schedule(step, cfg.max_steps) for step in (0, last // 2, last)])
    if errors:
        numbered = "".join(f"\n  {n}. {error}" for n, error in enumerate(errors, 1))
        raise UserError(errors[0] if len(errors) == 1 else f"{len(errors)} things do not fit:{numbered}")
    return parts


WHOLE = {"seed": 0, "batch_size": 1, "max_steps": 1, "validate_every": 1, "log_every": 1}
"""Whole numbers of the root -> their least value."""

_PARTS = ("data", "tokenizer", "model", "objective", "optimizer", "schedule", "decoding", "metric")

ROOT_KEYS = {*WHOLE, *_PARTS, "max_time", "max_samples", "resume", "ckpt", "init_from", "out", "format"} | {
    *("job", "task", "callback", "logger", "trainer", "paths", "sweep", "seeds")
}
"""Every key of the root that something reads."""

TRAINER_KEYS = {"accelerator", "devices", "strategy", "precision", "compile", "micro_batch_size", "threads"} | {
    *("matmul_precision", "recompute_activations", "tensor_parallel")
}
"""Every key of `trainer` that something reads."""


_CLASSIFYING = "task=classification objective=classification metric=classification callback=classification"


def check_task(cfg: DictConfig, made: dict[str, Any]) -> None:
    """Raise `UserError` unless task, objective, metric and corpus are all for labels, or none is."""
    objective, metric, data = made["objective"], made["metric"], made["data"]
    told = {
        f"task={str(cfg.task.get('_target_')).rsplit('.', 1)[-1]}": cfg.task.get("_target_") == _CLASSIFIER,
        f"objective={type(objective).__name__}": isinstance(objective, Classification),
        f"metric={type(metric).__name__}": isinstance(metric, ClassificationScores),
        f"data with {type(getattr(data, 'corpus', None)).__name__}": is_labelled(getattr(data, "corpus", None)),
    }
    if any(part is None for part in (objective, metric, data)) or len(set(told.values())) == 1:
        return
    yes = " and ".join(name for name, of_labels in told.items() if of_labels)
    no = " and ".join(name for name, of_labels in told.items() if not of_labels)
    raise UserError(
        f"{yes} {'is' if ' and ' not in yes else 'are'} for labels of texts, {no} "
        f"{'is' if ' and ' not in no else 'are'} not. To tell labels set {_CLASSIFYING} and a corpus with labels, such "
        "as data=reviews or data=labelled_files; else leave all of these out."
    )


_CLASSIFIER = "lmexp.task.classification.TextClassification"


def check_answers(objective: Any, sampling: Any, block_size: int, family: Family) -> None:
    """Raise `UserError` unless what is written for sources can be scored, and fits."""
    if not isinstance(objective, TextToText):
        raise UserError(
            f"callback.answers decodes the sources of pairs, and objective {type(objective).__name__} has none; choose "
            "callback=default, or objective=text_to_text."
        )
    if isinstance(sampling, Sampling) and sampling.temperature > 0:
        raise UserError(
            f"callback.answers scores what is written, and decoding.temperature={sampling.temperature} draws it by "
            "lot; choose decoding=greedy or decoding=beam."
        )
    fitted(sampling, objective, block_size, family)


def _callbacks(
    cfg: DictConfig, made_parts: dict[str, Any], errors: list[str], collect: Callable[[Callable[[], Any]], Any]
) -> list[Any]:
    metric, objective, sampling = (made_parts[key] for key in ("metric", "objective", "decoding"))
    for needed in ("tracking", "checkpoint"):
        if cfg.callback.get(needed) is None:
            errors.append(
                f"callback.{needed} is missing, and a run cannot do without; its own keys say how much it does."
            )
    names = [name for name, node in cfg.callback.items() if node is not None]
    if isinstance(objective, Classification) and "samples" in names:
        errors.append("callback.samples continues texts, and a classifier writes none; choose callback=classification.")
    if objective is not None and not isinstance(objective, Classification) and "predictions" in names:
        errors.append(
            f"callback.predictions shows what a classifier told, and objective {type(objective).__name__} makes none; "
            "choose callback=default."
        )
    made = {name: collect(partial(build_node, cfg, f"callback.{name}")) for name in names}
    checkpoint = made.pop("checkpoint", None)
    guard = made.get("guard")
    data = made_parts["data"]
    if guard is not None and guard.policy == "rollback" and data is not None and data.corpus.streaming:
        errors.append(
            "callback.guard.policy=rollback passes samples over, and a stream cannot be entered further on; choose "
            "skip, or a corpus that is not streamed."
        )
    measured = [f"val/{name}" for c in (metric, *made.values()) for name in getattr(c, "names", ())]
    data, model = made_parts["data"], made_parts["model"]
    if "answers" in made and None not in (objective, sampling, data, model):
        collect(lambda: check_answers(objective, sampling, data.block_size, model.family))
    if checkpoint is not None and measured and checkpoint.monitor not in measured:
        errors.append(f"callback.checkpoint.monitor={checkpoint.monitor}; expected one of {', '.join(measured)}.")
    stopping = made.get("early_stopping")
    if stopping is not None and checkpoint is not None and stopping.monitor is None:
        stopping.follow(checkpoint.monitor, "min" if checkpoint.sign == 1 else "max")
    if stopping is not None and not stopping.idle and measured and stopping.monitor not in measured:
        errors.append(f"callback.early_stopping.monitor={stopping.monitor}; expected one of {', '.join(measured)}.")
    used = [c for c in made.values() if not getattr(c, "idle", False)]  # each one costs every step something
    return [*used, checkpoint]  # last, whatever was added: it saves what the others did


def check_objective(cfg: DictConfig, made: dict[str, Any]) -> None:
    """Raise `UserError` unless the objective trains models of this family, on samples that the corpus has."""
    objective, model, data = made["objective"], made["model"], made["data"]
    if objective is None or model is None:
        return
    name = type(objective).__name__
    if model.family not in objective.families:
        raise UserError(
            f"objective {name} trains {_list(objective.families)} models, and {type(model).__name__} is "
            f"{_article(model.family)}; choose {FITTING[model.family]}."
        )
    if data is None:
        return
    if isinstance(objective, TextToText):
        objective.lengths(data.block_size, model.family)
        if objective.score_source and model.family != "decoder":
            raise UserError(
                f"objective.score_source=true, and {type(model).__name__} is an encoder-decoder, which does not tell "
                "its source; set it to false."
            )
        if isinstance(model, AutoModelSettings):
            raise UserError(_KEPT_APART.format(name=name))
    if data.document_mask and not objective.reads_documents:
        raise UserError(
            f"data.document_mask=true: objective {name} does not keep the documents of a block apart; set it to false."
        )
    if data.bpe_dropout and not isinstance(objective, ReadsWholeTexts):
        raise UserError(
            f"data.bpe_dropout={data.bpe_dropout}: objective {name} does not read each text whole, as those of "
            "translation, summarization and classification do; set it to 0."
        )
    if isinstance(objective, Classification):
        objective.most(data.block_size)
        if isinstance(model, AutoModelSettings):
            raise UserError(_KEPT_APART.format(name=name))
        if objective.segments and getattr(model, "n_segments", 0) < 2:
            raise UserError(
                f"objective.segments=true, and {type(model).__name__} has no segment embedding of two rows; set "
                "objective.segments=false, or model=bert model.n_segments=2."
            )
        return
    if not is_parted(data.corpus):
        if not objective.reads_texts:
            raise UserError(_NEEDS_PAIRS.format(name=name, but="the corpus has single texts"))
        return
    pairs = [part.name for part in data.parts if len(part.languages) > 1]
    if pairs and not objective.reads_pairs:
        fitting = "translation_lm" if model.family == "encoder" else "text_to_text"
        raise UserError(
            f"objective {name} reads single texts, and the corpus has pairs ({', '.join(pairs[:3])}); set "
            f"objective={fitting}, or give the corpus no pairs."
        )
    single = [part.name for part in data.parts if len(part.languages) == 1]
    if single and not objective.reads_texts:
        raise UserError(_NEEDS_PAIRS.format(name=name, but=f"the corpus has single texts ({', '.join(single[:3])})"))
    written = sorted({part.languages[-1] for part in data.parts})
    if isinstance(objective, TextToText) and len(written) > 1:
        raise UserError(
            f"objective {name} does not tell the model which language to write, and the corpus has pairs to write "
            f"{', '.join(written[:5])} in; choose pairs with one such language, as in data.corpus.languages=[en,de], "
            "or for data=cldr data.corpus.pairs=[[en,de]]."
        )
    known = getattr(model, "n_languages", 0)
    if isinstance(objective, TranslationLM) and objective.language_embeddings and known < len(data.corpus.languages):
        raise UserError(
            f"objective.language_embeddings=true with {len(data.corpus.languages)} languages, and the model has "
            f"embeddings for model.n_languages={known}; set model.n_languages={len(data.corpus.languages)}, or "
            "objective.language_embeddings=false."
        )


_KEPT_APART = (
    "model=auto keeps no texts of a row apart, and objective {name} puts several into one; choose a model of lmexp, "
    "with init_from=FOLDER for its weights."
)

_NEEDS_PAIRS = (
    "objective {name} reads a text beside the one to write for it, and {but}; choose data=parallel_files, "
    "'data=cldr data.corpus.pairs=[[en,de]] data.corpus.monolingual=false' or another corpus of pairs alone."
)

FITTING = {
    "decoder": "objective=causal_lm or prefix_lm for it, or model=bert",
    "encoder": "objective=masked_lm for it, or a decoder such as model=fast",
    "encoder_decoder": "objective=span_corruption, denoising or prefix_lm for it, or a decoder such as model=fast",
}
"""What to choose instead, for each model family."""


def _article(family: str) -> str:
    return f"a{'n' if family[0] in 'aeiou' else ''} {family.replace('_', '-')}"


def _list(families: Sequence[str]) -> str:
    return " and ".join(family.replace("_", "-") for family in families)


def check_devices(cfg: DictConfig, world_size: int) -> None:
    """Raise `UserError` if the devices asked for are not there, or the options for them do not go together."""
    import torch

    accelerator = accelerator_of(cfg)
    precision_of(cfg)
    if world_size > 1 and cfg.trainer.strategy == "single":
        raise UserError(
            f"trainer.devices={world_size} with trainer.strategy=single; set trainer.devices=1, or trainer=ddp (GPUs) "
            "or trainer=ddp_sim (processes on the CPU)."
        )
    there = {"cuda": torch.cuda.device_count(), "mps": 1}.get(accelerator)
    if there is not None and world_size > there:
        raise UserError(
            f"trainer.devices={world_size}, but there {'is' if there == 1 else 'are'} {there}; set "
            f"trainer.devices={there} or fewer."
        )
    if cfg.trainer.strategy not in ("single", "ddp", "fsdp"):
        raise UserError(f"trainer.strategy={cfg.trainer.strategy}; expected single, ddp or fsdp.")
    across = cfg.trainer.tensor_parallel
    _whole("trainer.tensor_parallel", across, 1)
    if across > 1 and cfg.trainer.strategy != "fsdp":
        raise UserError(
            f"trainer.tensor_parallel={across} with trainer.strategy={cfg.trainer.strategy}; expected fsdp, as in "
            "trainer=tp_fsdp."
        )
    if world_size % across:
        raise UserError(f"trainer.tensor_parallel={across} does not divide over {world_size} devices; change one.")
    if across > 1 and cfg.trainer.compile is True:
        raise UserError(
            f"trainer.tensor_parallel={across} with trainer.compile=true: its sums between devices are not compiled; "
            "set trainer.compile=false."
        )
    for key in ("compile", "recompute_activations"):
        if not isinstance(cfg.trainer[key], bool):
            raise UserError(f"trainer.{key}={cfg.trainer[key]}; expected true or false.")


def check_batch(cfg: DictConfig, made: dict[str, Any]) -> None:
    """Raise `UserError` unless it is said once how large a batch is, in a way that the objective knows."""
    data, objective = made["data"], made["objective"]
    if data is None or objective is None:
        return
    if (cfg.batch_size is None) == (data.batch_tokens is None):
        raise UserError(
            f"batch_size={cfg.batch_size} and data.batch_tokens={data.batch_tokens}; expected one of them, and null "
            "for the other: a batch is a number of samples, or as many as have so many tokens."
        )
    if data.batch_tokens is not None and not isinstance(objective, ReadsWholeTexts):
        raise UserError(
            f"data.batch_tokens={data.batch_tokens}: samples of objective {type(objective).__name__} have "
            f"data.block_size={data.block_size} tokens each; set data.batch_tokens=null and "
            f"batch_size={max(1, data.batch_tokens // data.block_size)}."
        )


def check_division(cfg: DictConfig, world_size: int) -> None:
    """Raise `UserError` unless the global batch divides over devices and micro-batches; names the nearest that do."""
    batch, micro = cfg.batch_size, cfg.trainer.micro_batch_size
    if micro is not None:
        _whole("trainer.micro_batch_size", micro, 1)
    across = cfg.trainer.tensor_parallel  # devices of which read the same
    if isinstance(across, int) and across > 0 and world_size % across == 0:
        world_size //= across
    unit = world_size * (micro or 1)
    if batch % unit:
        nearest = " or ".join(str(b) for b in (batch // unit * unit, (batch // unit + 1) * unit) if b)
        what = f"{world_size} device{'s' * (world_size > 1)}" + (f" in micro-batches of {micro}" if micro else "")
        smaller = ""
        if micro and batch % world_size == 0:
            share = batch // world_size
            fits = [m for m in range(1, share + 1) if share % m == 0]
            near = sorted(fits, key=lambda m: abs(m - micro))[:2]
            smaller = f", or trainer.micro_batch_size={' or '.join(str(m) for m in sorted(near))}"
        raise UserError(f"batch_size={batch} does not divide over {what}; set batch_size={nearest}{smaller}.")


def check_saving(cfg: DictConfig) -> None:
    """Raise `UserError` for checkpoints in pieces of what is in none."""
    saving = cfg.callback.get("checkpoint")
    if saving is not None and saving.get("sharded") and cfg.trainer.strategy != "fsdp":
        raise UserError(
            f"callback.checkpoint.sharded=true with trainer.strategy={cfg.trainer.strategy}, where every process has "
            "the whole; set it to false, or choose trainer=fsdp. (Such a checkpoint is read in any case.)"
        )


def check_out(out: Any, key: str = "out") -> None:
    """Raise `UserError` unless a file can be written at `out`, before the work is done."""
    if out is None:
        return
    path = Path(str(out))
    if path.is_dir() or not path.parent.is_dir():
        what = "is a directory" if path.is_dir() else f"there is no directory {path.parent}"
        raise UserError(f"{key}={out}: {what}; expected a path for a file in a directory that exists.")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{key}={out}: {path.parent} cannot be written to; choose another directory.")


def _whole(key: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{key}={value}; expected a whole number of at least {least}.")
