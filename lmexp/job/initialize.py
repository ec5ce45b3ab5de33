"""`init_from=`: initial weights from a run, a checkpoint, a Hugging Face folder or hub name, or a GGUF file.

`find` says what the source is, `check_fit` whether the configuration agrees with it (before anything slow), and
`initialize` puts the weights into the model once that and the tokenizer are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from omegaconf import DictConfig
from torch import Tensor, nn

from lmexp.contracts import UserError
from lmexp.huggingface import convert
from lmexp.huggingface.architecture import Imported, to_ours
from lmexp.huggingface.export import tokenizers_json
from lmexp.huggingface.files import find as find_huggingface
from lmexp.job.build import build_node
from lmexp.model.classifier import ClassifierHead
from lmexp.model.lora import LoRA, merged
from lmexp.model.surgery import grow_vocabulary, vocabulary_parameters
from lmexp.run import checkpoint as files
from lmexp.tokenizer.extended import extends, pieces
from lmexp.tokenizer.pretrained import Pretrained
from lmexp.tokenizer.tokenizer import Tokenizer

AUTO = "lmexp.model.auto.AutoModelSettings"

_IN_TRAINING_ONLY = ("init_std", "zero_init", "copy_init", "vocab_multiple")
"""Keys of models, besides those of dropout, that may differ: they don't say what the weights mean."""

_ANY_LENGTH = ("lmexp.model.llama.LlamaConfig", "lmexp.model.t5.T5Config", "lmexp.model.fast.FastConfig")
"""Models without a table of positions among their weights: `max_length` may differ."""

_DERIVED = {
    "n_kv_heads": "kv_heads",
    "d_head": "head_width",
    "d_kv": "head_width",
    "d_ff": "ff_width",
    "n_decoder_layers": "decoder_layers",
}
"""Keys that may be null -> the property that says what is meant then."""


@dataclass(frozen=True)
class Origin:
    """Where initial weights come from."""

    name: str
    """As `init_from` has it."""

    settings: dict[str, Any]
    """The model node that the weights belong to, `_target_` and its keys."""

    vocab_size: int
    """Rows of its vocabulary that may be tokens."""

    tokenizer: Tokenizer | None
    """Its tokenizer, None if it has none."""

    tokenizer_path: Path
    """What `tokenizer.path` can be set to, to have that one; written there if need be."""

    state: Callable[[], dict[str, Tensor]]
    """Reads the weights."""

    classes: tuple[str, ...] | None = None
    """Those of a classifier."""

    model_type: str | None = None
    """That of its config.json, None for weights by our names."""


def find(init_from: str, cache_dir: Path | str) -> Origin:
    """What `init_from` means; weights of Hugging Face's are not read yet. `cache_dir` gets tokenizers.

    Raises `UserError` if there is no such thing, or none that we have a model for.
    """
    path = Path(init_from).expanduser()
    is_run = (path / "checkpoints").is_dir()
    if is_run or (path.is_file() and path.suffix != ".gguf"):
        return _of_run(init_from, files.resolve(str(path)), Path(cache_dir))
    source = find_huggingface(init_from, cache_dir)
    tokenizer = None
    if source.tokenizer is not None:
        tokenizer = Pretrained(str(source.tokenizer)).train(iter(()))
    return Origin(
        name=init_from,
        settings=convert.settings(source.config),
        vocab_size=source.config["vocab_size"],
        tokenizer=tokenizer,
        tokenizer_path=source.tokenizer or source.folder,
        state=source.state,
        classes=_their_classes(source.config),
        model_type=source.config["model_type"],
    )


def _of_run(name: str, path: Path, cache_dir: Path) -> Origin:
    checkpoint = files.load_model(path)
    entry = checkpoint["lmexp"]
    tokenizer = Tokenizer.from_json(entry["tokenizer"])
    return Origin(
        name=name,
        settings=entry["config"]["model"],
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer,
        tokenizer_path=cache_dir / "tokenizers" / f"{tokenizer.fingerprint()[:16]}.json",
        state=lambda: model_weights(checkpoint),
        classes=None if entry.get("classes") is None else tuple(entry["classes"]["classes"]),
    )


def _their_classes(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The labels that a config.json of a classifier names."""
    names = config.get("id2label")
    if names is None or not str((config.get("architectures") or [""])[0]).endswith("ForSequenceClassification"):
        return None
    return tuple(names[key] for key in sorted(names, key=int))


def model_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's weights in a checkpoint, or their moving average where it has one, by the model's own names, with
    its adapters merged."""
    weights = {**checkpoint["state_dict"], **checkpoint.get("average", {})}
    own = {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
    lora = checkpoint["lmexp"]["config"]["task"].get("lora")
    return own if lora is None else merged(own, LoRA.of(lora).scale)


def check_fit(origin: Origin, cfg: DictConfig) -> None:
    """Raise `UserError` unless `model` is what the weights belong to, and `tokenizer` theirs as far as that can be
    known before it is trained. The error has the overrides that mend it."""
    wanted, own = origin.settings["_target_"], cfg.model.get("_target_")
    if own == AUTO and origin.model_type is not None:
        raise UserError(
            f"init_from={origin.name} with model=auto, which reads such weights itself: set model.name={origin.name} "
            "model.pretrained=true and leave init_from out."
        )
    if own != wanted:
        option = wanted.split(".")[2]
        given = {key: value for key, value in origin.settings.items() if key != "_target_"}
        raise UserError(
            f"init_from={origin.name} has the weights of {wanted}, and the model is {own}. Choose the option that it "
            f"is, or set all of it: model={option} {overrides(given)}"
        )
    configured = build_node(cfg, "model")
    expected = get_class(wanted)(**{key: value for key, value in origin.settings.items() if key != "_target_"})
    differing = {}
    told = []
    for field in fields(expected):
        key = field.name
        if key in _IN_TRAINING_ONLY or "dropout" in key or (key == "max_length" and wanted in _ANY_LENGTH):
            continue
        here, there = _meant(configured, key), _meant(expected, key)
        if not _equal(here, there):
            told.append(f"model.{key}={_spelled(here)}, in the source {_spelled(there)}")
            differing[key] = there
    if told:
        raise UserError(
            f"init_from={origin.name} has weights of another shape than model has:\n    "
            + "\n    ".join(told)
            + f"\n  Set: {overrides(differing)}"
        )
    tokenizer = build_node(cfg, "tokenizer")
    if origin.tokenizer is not None and not tokenizer.needs_text:
        roles = build_node(cfg, "objective").special_tokens(configured.family)
        _refuse_other_tokenizer(origin, tokenizer.train(iter(())).with_roles(roles))


def _meant(config: Any, key: str) -> Any:
    """A key's value, or what null means for it."""
    value = getattr(config, key)
    return getattr(config, _DERIVED[key], None) if value is None and key in _DERIVED else value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, float) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-6)  # GGUF files hold such numbers as float32
    return bool(a == b)


def _spelled(value: Any) -> str:
    """A value as Hydra's command line has it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_spelled(item)}" for key, item in value.items()) + "}"
    return str(value)


def overrides(settings: Mapping[str, Any]) -> str:
    """Model settings as they are written on the command line."""
    parts = [f"model.{key}={_spelled(value)}" for key, value in settings.items()]
    return " ".join(f"'{part}'" if "{" in part else part for part in parts)


def initialize(
    model: nn.Module, origin: Origin, tokenizer: Tokenizer, say: Callable[[str], None] = lambda text: None
) -> Imported:
    """Put the weights of `origin` into a model that was just built for `tokenizer`, in place; returns what was new
    and what was left aside, and tells `say` so.

    The tokenizer may have more tokens at its end than the source's; their rows begin as means (`grow_vocabulary`).
    Rows of the source's that are no tokens, padding of its vocabulary, are left out.
    Raises `UserError` for any other misfit: another tokenizer or vocabulary, shapes, missing weights.
    """
    _refuse_other_tokenizer(origin, tokenizer)
    n_tokens = min(origin.vocab_size, origin.tokenizer.vocab_size if origin.tokenizer else origin.vocab_size)
    if origin.model_type is None:
        imported = _by_our_names(model, origin, n_tokens)
    else:
        imported = _by_their_names(model, origin, n_tokens)
    weights = imported.weights
    if isinstance(model.head, ClassifierHead) and not _same_classes(origin.classes, model.head.labels):
        weights = {name: value for name, value in weights.items() if not name.startswith("head.output.")}
    if model.vocab_size > n_tokens:  # type: ignore[operator]
        weights = grow_vocabulary(weights, model, _pieces(origin, tokenizer, n_tokens), n_tokens)
    own = model.state_dict()
    for name, value in weights.items():
        if value.shape != own[name].shape:
            raise UserError(
                f"init_from={origin.name}: {name} is {tuple(value.shape)} there and {tuple(own[name].shape)} in the "
                "model; set the model's options as they were when the weights were made."
            )
    model.load_state_dict(weights, strict=False)
    given = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in weights}
    new = [name for name, p in model.named_parameters() if id(p) not in given]
    imported = replace(imported, weights=weights, new=new)
    say(_told(origin, imported, tokenizer.vocab_size - n_tokens))
    return imported


def _same_classes(theirs: Sequence[str] | None, ours: Sequence[str]) -> bool:
    """Whether a head for the ones tells the others: LABEL_0 and so on, which stand for any, among them."""
    unnamed = tuple(f"LABEL_{number}" for number in range(len(ours)))
    return theirs is None or tuple(theirs) in (tuple(ours), unnamed)


def _by_our_names(model: nn.Module, origin: Origin, n_tokens: int) -> Imported:
    state, own = origin.state(), model.state_dict()
    vocabulary = vocabulary_parameters(model)
    weights = {}
    for name in state.keys() & own.keys():
        cut = name in vocabulary and state[name].shape[0] > own[name].shape[0]  # its vocabulary was padded further
        weights[name] = state[name][:n_tokens] if cut else state[name]
    return Imported(weights, [], sorted(state.keys() - own.keys()))


def _by_their_names(model: Any, origin: Origin, n_tokens: int) -> Imported:
    assert origin.model_type is not None
    architecture = convert.architecture(origin.model_type)
    with torch.device("meta"):  # the same model with their vocabulary
        theirs = replace(model.config, vocab_multiple=1).build(n_tokens)
        if isinstance(model.head, ClassifierHead):
            head = model.head
            theirs.head = ClassifierHead(
                head.output.in_features, origin.classes or head.labels, head.hidden is not None, 0
            )
    state = origin.state()
    imported = to_ours(architecture, theirs, state, n_tokens)
    required = {rule.ours for rule in architecture.rules(theirs) if not rule.optional}
    missing = sorted(required - imported.weights.keys())
    if missing:
        raise UserError(
            f"init_from={origin.name} lacks {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}, which "
            f"every {origin.model_type} has; its weights are not whole, or are another model's."
        )
    own = model.state_dict()  # of a classifier, without the head over the vocabulary
    weights = {name: value.to(own[name].dtype) for name, value in imported.weights.items() if name in own}
    unused = [n for n in imported.unused if not n.endswith(architecture.computed)]
    return Imported(weights, imported.new, unused + sorted(imported.weights.keys() - own.keys()))


def _pieces(origin: Origin, tokenizer: Tokenizer, n_tokens: int) -> list[list[int]]:
    """The source's tokens that each new one was spelled with; none for special tokens."""
    if origin.tokenizer is not None and extends(origin.tokenizer, tokenizer):
        return [[i for i in row if i < n_tokens] for row in pieces(origin.tokenizer, tokenizer)]
    spelled = [tokenizer.decode([i], skip_special=True) for i in range(n_tokens, tokenizer.vocab_size)]
    if origin.tokenizer is None:
        return [[] for _ in spelled]
    ids = [[int(i) for i in row] for row in origin.tokenizer.encode(spelled)] if spelled else []
    return [[i for i in row if i < n_tokens] for row in ids]


def _refuse_other_tokenizer(origin: Origin, tokenizer: Tokenizer) -> None:
    """Raise `UserError` unless the ids of the source mean the same here."""
    if origin.tokenizer is None:
        if tokenizer.vocab_size != origin.vocab_size:
            raise UserError(
                f"init_from={origin.name} has {origin.vocab_size} rows in its vocabulary and no tokenizer.json, and "
                f"the tokenizer here has {tokenizer.vocab_size} tokens; set tokenizer=pretrained tokenizer.path=FILE "
                "with the tokenizer that belongs to it."
            )
        return
    if _continues(origin.tokenizer, tokenizer) or extends(origin.tokenizer, tokenizer):
        return
    path = origin.tokenizer_path
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(origin.tokenizer.to_json(), encoding="utf-8")
    raise UserError(
        f"init_from={origin.name} belongs to a tokenizer of {origin.tokenizer.vocab_size} tokens, which is not the "
        f"one here ({tokenizer.vocab_size} tokens): its ids mean other text. Set tokenizer=pretrained "
        f"tokenizer.path={path}"
    )


def _continues(old: Tokenizer, new: Tokenizer) -> bool:
    """Whether every id of the old tokenizer means the same to the new one, which may have special tokens more."""
    forms = [tokenizers_json(tokenizer) for tokenizer in (old, new)]
    added = []
    for form in forms:
        form.pop("post_processor", None)  # is not used
        added.append({(token["id"], token["content"]) for token in form.pop("added_tokens")})
    return added[0] <= added[1] and forms[0] == forms[1]


def _told(origin: Origin, imported: Imported, n_new: int) -> str:
    text = f"Initial weights: {len(imported.weights)} tensors of {origin.name}."
    if n_new > 0:
        text += f" {n_new} new tokens begin as means of others."
    if imported.new:
        text += f" Not in it, and at random: {_few(imported.new)}."
    if imported.unused:
        text += f" Left aside: {_few(imported.unused)}."
    return text


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"
