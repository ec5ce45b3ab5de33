"""What a corpus looks like once it is tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each token, document ends included."""
        return self.bytes / self.tokens


_HEADER = ("split", "documents", "tokens", "bytes", "bytes/token", "unknown", "longest")


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

    def rows(self) -> list[tuple[str, ...]]:
        """One row a split, as text, under split, documents, tokens, bytes, bytes/token, unknown, longest."""
        return [
            (
                name,
                f"{s.documents:,}",
                f"{s.tokens:,}",
                f"{s.bytes:,}",
                f"{s.bytes_per_token:.2f}",
                f"{s.unknown / s.tokens:.3%}",
                f"{s.longest:,}",
            )
            for name, s in self.splits.items()
        ]

    def markdown(self) -> str:
        """The report for TensorBoard's text page."""
        lines = [_HEADER, ("---",) + ("---:",) * (len(_HEADER) - 1), *self.rows()]
        table = "\n".join("| " + " | ".join(row) + " |" for row in lines)
        sample = "\n".join(f"    {line}" for line in self.sample.splitlines())
        return f"{table}\n\nVocabulary: {self.vocab_size:,} tokens. A sample, decoded:\n\n{sample}\n"

    def table(self) -> Table:
        """The report for the terminal."""
        from rich.table import Table

        table = Table(title=f"Data, as {self.vocab_size:,} different tokens", title_justify="left")
        for number, name in enumerate(_HEADER):
            table.add_column(name, justify="left" if number == 0 else "right")
        for row in self.rows():
            table.add_row(*row)
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
