"""Any language model of Hugging Face Transformers as it is: at random weights, or as it was pretrained.

Its own forward gives logits, all at once, so what stands here for hidden states are logits, and the head is the
identity with a loss. That costs memory (B x T x V numbers) which lmexp's own families do not need.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmexp.contracts import IGNORE_INDEX, Family, UserError
from lmexp.model.layers import training_flops

_KINDS: dict[str, tuple[str, Family]] = {
    "causal": ("AutoModelForCausalLM", "decoder"),
    "masked": ("AutoModelForMaskedLM", "encoder"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "encoder_decoder"),
}
"""`kind` -> their class and our family."""

_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
"""What their configurations call the longest context; where none is there, positions are relative."""

_UNLIMITED = 2**20


@dataclass(frozen=True)
class AutoModelSettings:
    """Which model of Transformers, and how it is made."""

    name: str | None
    """A folder that `save_pretrained` wrote, a name on the hub, or, at random weights, a `model_type` such as opt."""

    kind: str = "causal"
    """What it is: causal (a decoder), masked (an encoder) or seq2seq (both)."""

    pretrained: bool = False
    """Start from its weights instead of random ones."""

    overrides: Mapping[str, Any] | None = None
    """Keys of its config.json to have otherwise, such as {num_hidden_layers: 2}; null: none."""

    def __post_init__(self) -> None:
        if not self.name:
            raise UserError("model.name is not given; expected a folder, a hub name or a model_type: model.name=gpt2.")
        if self.kind not in _KINDS:
            raise UserError(f"model.kind={self.kind}; expected one of {', '.join(_KINDS)}.")
        if not isinstance(self.pretrained, bool):
            raise UserError(f"model.pretrained={self.pretrained}; expected true or false.")
        if self.overrides is not None and not isinstance(self.overrides, Mapping):
            raise UserError(f"model.overrides={self.overrides}; expected keys and values: {{num_hidden_layers: 2}}.")

    @property
    def family(self) -> Family:
        """Ours, by the kind."""
        return _KINDS[self.kind][1]

    def build(self, vocab_size: int) -> AutoModel:
        """The model for token ids below `vocab_size`; on the device `meta` its shapes alone.

        Random weights have exactly that vocabulary; a pretrained one grows at its end if it has to.
        Raises `UserError` for a model that is not there or cannot be made.
        """
        transformers = _transformers()
        on_meta = torch.empty(0).device.type == "meta"
        auto = getattr(transformers, _KINDS[self.kind][0])
        try:
            config = self._their_config(transformers)
            if self.pretrained and not on_meta:
                network = auto.from_pretrained(self.name, config=config).float()
                if vocab_size > config.get_text_config().vocab_size:
                    network.resize_token_embeddings(vocab_size)
            else:
                _set_vocabulary(config, vocab_size)
                network = auto.from_config(config)
        except UserError:
            raise
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, AssertionError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"model.name={self.name} (kind {self.kind}, overrides {self.overrides}) cannot be made by "
                f"Transformers: {reason} Check the name and the kind; without a network, give a folder."
            ) from error
        return AutoModel(self, network.train())

    def _their_config(self, transformers: Any) -> Any:
        name = str(self.name)
        if not self.pretrained and not Path(name).exists() and name in transformers.CONFIG_MAPPING:
            kind, values = name, {}
        else:
            values = transformers.PretrainedConfig.get_config_dict(name)[0]
            kind = values.pop("model_type", None)
        plain = transformers.AutoConfig.for_model(kind, **values)
        unknown = [key for key in self.overrides or {} if not hasattr(plain, key)]
        if unknown:
            raise UserError(
                f"model.overrides: {type(plain).__name__} has no {', '.join(unknown)}; its keys are "
                f"{', '.join(sorted(plain.to_dict()))}."
            )
        return transformers.AutoConfig.for_model(kind, **{**values, **(self.overrides or {})})


class AutoModel(nn.Module):
    """Tokens (B, T) int64 to logits (B, T, V); for `seq2seq` also `decoder_tokens` (B, U), to logits (B, U, V)."""

    def __init__(self, config: AutoModelSettings, network: Any) -> None:
        super().__init__()
        self.config, self.family = config, config.family
        theirs = network.config.get_text_config()
        output = network.get_output_embeddings()
        output = network.get_input_embeddings() if output is None else output
        self.head = LogitsHead(output.weight)  # before the network, so that it is told from the hidden matrices
        self.network = network
        self.vocab_size: int = output.weight.shape[0]
        self.max_length = _max_length(network)
        self.n_layers: int = theirs.num_hidden_layers
        self.decoder_start_id = _first_of(theirs, "decoder_start_token_id", "bos_token_id", "pad_token_id")
        accepted = set(inspect.signature(network.forward).parameters)
        self._takes_positions = "position_ids" in accepted and self.family == "decoder"
        # what their cache is called changed in Transformers 5; None: the model has none
        self._cache_name = next((name for name in ("cache", "past_key_values") if name in accepted), None)

    def forward(
        self,
        tokens: Tensor,
        decoder_tokens: Tensor | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        decoder_documents: Tensor | None = None,
        decoder_positions: Tensor | None = None,
        cache: Past | None = None,
        prefix: Tensor | None = None,
        languages: Tensor | None = None,
    ) -> Tensor:
        """Logits, at least float32.

        `documents` (B, T): -1 for padding, 0 elsewhere; `UserError` for more than one text in a row, and for a prefix
        or languages, which these models have no place for. `positions` (B, T): a decoder's, instead of 0, 1, ...
        `cache`: `tokens` follow what it holds, and are added to it.
        """
        if prefix is not None or languages is not None:
            what = "a prefix that sees both ways" if prefix is not None else "language embeddings"
            raise UserError(f"model=auto has no {what}; choose another objective, or one of lmexp's own models.")
        if self.family == "encoder_decoder":
            assert decoder_tokens is not None, "an encoder-decoder reads decoder_tokens"
            memory = self.encode(tokens, documents, positions)
            return self.decode(decoder_tokens, memory, documents, decoder_documents, decoder_positions)
        if cache is not None:
            return self._with_cache(tokens, documents, positions, cache)
        return self._run(tokens, _mask(documents), positions).logits

    def _run(self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None, **more: Any) -> Any:
        if positions is not None and self._takes_positions:
            more["position_ids"] = positions
        return self.network(input_ids=tokens, attention_mask=mask, **more)

    def _with_cache(self, tokens: Tensor, documents: Tensor | None, positions: Tensor | None, cache: Past) -> Tensor:
        mask = _joined(cache.mask, _mask(documents))
        length = tokens.shape[1]
        if self._cache_name is not None:
            out = self._run(tokens, mask, positions, use_cache=True, **{self._cache_name: cache.past})
            cache.past, logits = getattr(out, self._cache_name), out.logits
        else:  # a model without a cache reads everything anew
            cache.tokens, cache.positions = _joined(cache.tokens, tokens), _joined(cache.positions, positions)
            assert cache.tokens is not None
            logits = self._run(cache.tokens, mask, cache.positions).logits[:, -length:]
        cache.mask, cache.length = mask, cache.length + length
        return logits

    def encode(self, tokens: Tensor, documents: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """What the decoder reads, (B, S, D)."""
        encoder = self.network.get_encoder()
        return encoder(input_ids=tokens, attention_mask=_mask(documents)).last_hidden_state

    def decode(
        self,
        decoder_tokens: Tensor,
        memory: Tensor,
        documents: Tensor | None = None,
        decoder_documents: Tensor | None = None,
        decoder_positions: Tensor | None = None,
        cache: Past | None = None,
    ) -> Tensor:
        """Logits (B, U, V) of the tokens after `decoder_tokens`; `documents` (B, S) say what of `memory` is padding."""
        from transformers.modeling_outputs import BaseModelOutput

        own = _mask(decoder_documents)
        more: dict[str, Any] = {"use_cache": False}
        if cache is not None:
            assert self._cache_name is not None, "every encoder-decoder of Transformers has a cache"
            own = _joined(cache.mask, own)
            more = {"use_cache": True, self._cache_name: cache.past}
        out = self.network(
            encoder_outputs=BaseModelOutput(last_hidden_state=cast(Any, memory)),
            attention_mask=_mask(documents),
            decoder_input_ids=decoder_tokens,
            decoder_attention_mask=own,
            **more,
        )
        if cache is not None:
            cache.past, cache.mask = getattr(out, str(self._cache_name)), own
            cache.length += decoder_tokens.shape[1]
        return out.logits

    def flops_per_token(self, length: int) -> float:
        """FLOPs a token of a training step at context `length`, as of a dense transformer; see `training_flops`."""
        theirs = self.network.config.get_text_config()
        table = self.network.get_input_embeddings().weight
        lookups = 0 if table is self.head.weight else table.numel()
        return training_flops(self, lookups, theirs.hidden_size, self.n_layers, length)

    def new_cache(self, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> Past:
        """An empty cache; Transformers makes room as it goes."""
        return Past(device)


class Past:
    """What Transformers keeps of the positions seen so far, or, for models that keep nothing, these themselves."""

    places: None = None
    """A `KVCache`'s, once its rows have columns of their own; these never do."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.length = device, 0
        self.past: Any = None
        self.mask: Tensor | None = None
        self.tokens: Tensor | None = None
        self.positions: Tensor | None = None

    def begin_columns(self) -> None:
        """As a `KVCache`'s; here the mask goes on to be joined."""

    def select(self, rows: Sequence[int]) -> Tensor:
        """As a `KVCache`'s; each row has a text of its own."""
        index = torch.tensor(rows, device=self.device)
        if self.past is not None:
            self.past.reorder_cache(index)
        for name in ("mask", "tokens", "positions"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value[index])
        return index


class LogitsHead(nn.Module):
    """Takes logits for hidden states; `weight` (V, D) is the network's own, for others to see."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor) -> Tensor:
        """The logits (..., V), at least float32."""
        return hidden.float() if hidden.dtype in (torch.bfloat16, torch.float16) else hidden

    def loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        n_chunks: int | None = None,
        reduction: Literal["sum", "none"] = "sum",
    ) -> Tensor:
        """-log softmax(logits)[label] of logits (N, V) and labels (N,): their sum () or each (N,); see `Head.loss`.
        The logits are there already, so `n_chunks` has nothing to save."""
        return F.cross_entropy(self(hidden), labels, ignore_index=IGNORE_INDEX, reduction=reduction)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "model=auto needs the library transformers; install it with pip install transformers."
        ) from error
    return transformers


def _set_vocabulary(config: Any, vocab_size: int) -> None:
    text = config.get_text_config()
    text.vocab_size = vocab_size
    if hasattr(text, "decoder_vocab_size"):
        text.decoder_vocab_size = vocab_size
    for key in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_eos_token_id"):
        token = getattr(text, key, None)
        if isinstance(token, int) and token >= vocab_size:  # of their own vocabulary; a row must exist for padding
            setattr(text, key, vocab_size - 1 if key in ("pad_token_id", "decoder_start_token_id") else None)


def _max_length(network: Any) -> int:
    config = network.config.get_text_config()
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1  # RoBERTa counts from the row after padding's
    return next((int(n) for key in _LENGTHS if isinstance(n := getattr(config, key, None), int) and n > 0), _UNLIMITED)


def _first_of(config: Any, *keys: str) -> int:
    return next((value for key in keys if isinstance(value := getattr(config, key, None), int)), 0)


def _mask(documents: Tensor | None) -> Tensor | None:
    """Their attention mask (B, T), 1 where a token is; `UserError` for rows of several texts.

    Reads one number from the device: these models can only be told what padding is.
    """
    if documents is None:
        return None
    if documents.device.type != "meta" and (documents.max() > 0).item():
        raise UserError(
            "model=auto cannot keep the texts of a row apart: it was given rows with more than one. Set "
            "data.document_mask=false, or choose one of lmexp's own models."
        )
    return (documents >= 0).long()


def _joined(past: Tensor | None, new: Tensor | None) -> Tensor | None:
    if past is None or new is None:
        assert past is None or new is None
        return new
    return torch.cat((past, new), 1)
