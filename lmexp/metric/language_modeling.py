"""Loss, perplexity and bits per byte from sums and counts."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class LanguageModeling(Metric):
    """Sums of negative log-likelihood (nats), scored tokens and their UTF-8 bytes; ratios only at the end.

    State is reduced over devices by summing, so that the numbers do not depend on how samples were split.
    """

    names = ("loss", "perplexity", "bits_per_byte")
    """What `compute` gives."""

    full_state_update = False
    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        # MPS has no float64; float32 sums of per-batch sums lose about 1e-7 of the total a batch there
        dtype = torch.float32 if torch.backends.mps.is_available() else torch.float64
        for name in ("nats", "tokens", "bytes"):
            self.add_state(name, torch.zeros((), dtype=dtype), dist_reduce_fx="sum")
        self.set_dtype(dtype)

    def update(self, nats: Tensor, tokens: Tensor, n_bytes: Tensor) -> None:
        """Add a batch: its summed loss (), scored tokens () and bytes ()."""
        self.nats += nats.to(self.nats.dtype)
        self.tokens += tokens.to(self.tokens.dtype)
        self.bytes += n_bytes.to(self.bytes.dtype)

    def compute(self) -> dict[str, float]:
        """loss (nats a token), perplexity = exp(loss), bits_per_byte = nats / ln 2 / bytes (if bytes are known)."""
        nats, tokens, n_bytes = self.nats.item(), self.tokens.item(), self.bytes.item()
        if tokens == 0:
            return {}
        loss = nats / tokens
        result = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
        if n_bytes:
            result["bits_per_byte"] = nats / math.log(2) / n_bytes
        return result
