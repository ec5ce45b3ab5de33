"""What a corpus looks like once it is tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class SplitReport:
    """Counts of one split."""

    documents: int
    """Documents, empty ones left out."""

    tokens: int
    """Tokens, with a document end before the first document and after each."""

    bytes: int
    """UTF-8 bytes of text."""

    unknown: int
    """Tokens that stand for text outside the vocabulary."""

    longest: int
    """Tokens of the longest document."""

    words: int
    """Words: runs of letters, digits and underscores between other characters."""

    fragments: int
    """Tokens that are only part of a character: what a byte-level vocabulary falls back to."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each token, document ends included."""
        return self.bytes / self.tokens

    @property
    def fertility(self) -> float:
        """Tokens for each word (Rust et al. 2021, section 4.1), document ends included; high where the vocabulary
        does not know a language."""
        return self.tokens / max(1, self.words)


@dataclass(frozen=True)
class Lengths:
    """How many tokens texts have, marks not counted, and what of them is cut."""

    texts: int
    """How many there are."""

    mean: float
    """Tokens of a text."""

    median: float
    """The same in the middle."""

    most: tuple[float, float]
    """What 95 and what 99 of 100 have at most."""

    longest: int
    """Tokens of the longest."""

    cut: int
    """Texts that are too long."""

    lost: int
    """Tokens that are cut off them."""

    @classmethod
    def of(cls, tokens: np.ndarray, lost: np.ndarray) -> Lengths:
        """Of texts with so many tokens (n,), n at least 1, of which so many (n,) are cut off."""
        median, *most = np.quantile(tokens, (0.5, 0.95, 0.99)).tolist()
        return cls(
            *(len(tokens), float(tokens.mean()), median, (most[0], most[1]), int(tokens.max())),
            *(int((lost > 0).sum()), int(lost.sum())),
        )


def lengths_markdown(lengths: Mapping[str, Lengths]) -> str:
    """For TensorBoard's text page: a row for each split and text."""
    lines = [
        "| tokens of a text | texts | mean | median | 95 % | 99 % | longest | cut | tokens lost |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, x in lengths.items():
        numbers = f"{x.mean:.1f} | {x.median:.0f} | {x.most[0]:.0f} | {x.most[1]:.0f} | {x.longest:,}"
        lines.append(f"| {name} | {x.texts:,} | {numbers} | {x.cut:,} ({x.cut / x.texts:.1%}) | {x.lost:,} |")
    return "\n".join(lines)


_HEADER = ("split", "documents", "tokens", "bytes", "bytes/token", "tokens/word", "unknown", "fragments", "longest")
_LEFT_OUT = ("bytes", "fragments", "longest")  # where there is little room


@dataclass(frozen=True)
class DataReport:
    """What the token cache holds, split by split."""

    splits: dict[str, SplitReport]
    """The counts of each split."""

    vocab_size: int
    """Tokens there are."""

    sample: str
    """The start of a document, encoded and decoded again."""

    path: str
    """Where the tokens lie."""

    shares: dict[str, float] = field(default_factory=dict)
    """Of a corpus of parts: the share of training samples that each training split gets."""

    @property
    def header(self) -> tuple[str, ...]:
        """The names of the columns."""
        return (*_HEADER, "drawn") if self.shares else _HEADER

    def rows(self) -> list[tuple[str, ...]]:
        """One row a split, as text, under `header`."""
        return [
            (
                name,
                f"{s.documents:,}",
                f"{s.tokens:,}",
                f"{s.bytes:,}",
                f"{s.bytes_per_token:.2f}",
                f"{s.fertility:.2f}",
                f"{s.unknown / s.tokens:.3%}",
                f"{s.fragments / s.tokens:.3%}",
                f"{s.longest:,}",
                *([f"{self.shares[name]:.2%}" if name in self.shares else ""] if self.shares else []),
            )
            for name, s in self.splits.items()
        ]

    def markdown(self) -> str:
        """The report for TensorBoard's text page."""
        lines = [self.header, ("---",) + ("---:",) * (len(self.header) - 1), *self.rows()]
        table = "\n".join("| " + " | ".join(row) + " |" for row in lines)
        sample = "\n".join(f"    {line}" for line in self.sample.splitlines())
        return f"{table}\n\nVocabulary: {self.vocab_size:,} tokens. A sample, decoded:\n\n{sample}\n"

    def table(self) -> Table:
        """What fits into a terminal: the main columns, and of a corpus of parts only the training splits."""
        from rich.table import Table

        table = Table(title=f"Data, as {self.vocab_size:,} different tokens", title_justify="left")
        shown = [number for number, name in enumerate(self.header) if name not in _LEFT_OUT]
        for number in shown:
            name = self.header[number].replace("/", " per ")
            table.add_column(name, justify="left" if number == 0 else "right", no_wrap=number == 0)
        for row in self.rows():
            if not self.shares or row[0].startswith("train"):
                table.add_row(*(row[number] for number in shown))
        return table

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON, without the path."""
        return {
            "splits": {name: vars(split) for name, split in self.splits.items()},
            "vocab_size": self.vocab_size,
            "sample": self.sample,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any], path: str) -> DataReport:
        """What `to_dict` gave."""
        splits = {name: SplitReport(**split) for name, split in content["splits"].items()}
        return cls(splits, content["vocab_size"], content["sample"], path)
