"""Loss, perplexity and bits per byte from sums and counts, of all text and of each part of a corpus."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lmexp.contracts import IGNORE_INDEX


class LanguageModeling(Metric):
    """Sums of negative log-likelihood (nats), scored tokens and their UTF-8 bytes; ratios only at the end.

    State is reduced over devices by summing, so that the numbers do not depend on how samples were split.
    """

    full_state_update = False
    nats: Tensor
    tokens: Tensor
    bytes: Tensor
    part_sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        # MPS has no float64; float32 sums of per-batch sums lose about 1e-7 of the total a batch there
        self._float = torch.float32 if torch.backends.mps.is_available() else torch.float64
        for name in ("nats", "tokens", "bytes"):
            self.add_state(name, torch.zeros((), dtype=self._float), dist_reduce_fx="sum")
        self.set_dtype(self._float)
        self.bits: str | None = "bits_per_byte"
        self.parts: tuple[str, ...] = ()
        self._token_bytes = torch.zeros(0)

    def bind(self, bits: str | None, parts: Sequence[str] = (), token_bytes: Tensor | None = None) -> None:
        """What the experiment decides: what to call nats over bytes (None: they mean nothing), the parts of the
        corpus to tell apart, and the bytes of each token id (V,), which are needed for these."""
        self.bits = bits
        self.parts = tuple(parts) if len(parts) > 1 else ()
        if self.parts:
            self.add_state("part_sums", torch.zeros(len(self.parts), 3, dtype=self._float), dist_reduce_fx="sum")
        if token_bytes is not None:
            self._token_bytes = token_bytes

    @property
    def names(self) -> tuple[str, ...]:
        """What `compute` gives, as far as all parts together go."""
        return ("loss", "perplexity", *((self.bits,) if self.bits else ()))

    def update(self, nats: Tensor, tokens: Tensor, n_bytes: Tensor) -> None:
        """Add a batch: its summed loss (), scored tokens () and bytes ()."""
        self.nats += nats.to(self.nats.dtype)
        self.tokens += tokens.to(self.tokens.dtype)
        self.bytes += n_bytes.to(self.bytes.dtype)

    def update_parts(self, nats: Tensor, labels: Tensor, parts: Tensor) -> None:
        """Add a batch to the parts: the loss, the label and the part of each position, all (N,)."""
        scored = labels != IGNORE_INDEX
        labels = labels.clamp_min(0)
        self._token_bytes = self._token_bytes.to(labels.device)
        n_bytes = self._token_bytes[labels] if len(self._token_bytes) else torch.zeros_like(nats)
        columns = torch.stack((nats, torch.ones_like(nats), n_bytes.to(nats.dtype)), 1) * scored[:, None]
        self.part_sums.index_add_(0, parts, columns.to(self.part_sums.dtype))

    def compute(self) -> dict[str, float]:
        """loss (nats a token), perplexity = exp(loss), bits (nats / ln 2 / bytes, where they mean something and bytes
        are known); `loss/<part>` and bits of each part."""
        result = self._ratios(self.nats.item(), self.tokens.item(), self.bytes.item())
        for part, sums in zip(self.parts, self.part_sums.tolist() if self.parts else (), strict=True):
            ratios = self._ratios(*sums)
            ratios.pop("perplexity", None)
            result |= {f"{name}/{part}": value for name, value in ratios.items()}
        return result

    def _ratios(self, nats: float, tokens: float, n_bytes: float) -> dict[str, float]:
        if tokens == 0:
            return {}
        loss = nats / tokens
        result = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
        if n_bytes and self.bits:
            result[self.bits] = nats / math.log(2) / n_bytes
        return result
