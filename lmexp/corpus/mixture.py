"""Several corpora as the parts of one: a data set for each language, or for each kind of text."""

from __future__ import annotations

from collections.abc import Mapping

from lmexp.contracts import Split, UserError
from lmexp.corpus.parts import Part, Parted, Texts, check_alpha

_SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class Mixture(Parted):
    """Named corpora, drawn from by their smoothed sizes.

    It has the splits that every part has; a corpus of parts among them gives its own. Raises `UserError` without
    parts, for parts that are streamed, and for languages of parts that there are not.
    """

    def __init__(
        self, parts: Mapping[str, Texts] | None, languages: Mapping[str, str] | None = None, alpha: float = 0.7
    ) -> None:
        """`parts`: name -> corpus. `languages`: name -> language, where the name is not the language itself.
        `alpha`: of the probabilities, from 0 (all parts alike) to 1 (as they are)."""
        if not parts:
            raise UserError(
                "corpus.parts is not given; expected a corpus for each name, as conf/data/mixture.yaml shows: "
                "data.corpus.parts={en: {_target_: lmexp.corpus.files.Files, path: en.txt}}."
            )
        check_alpha(alpha)
        for name, corpus in parts.items():
            if not hasattr(corpus, "splits"):
                raise UserError(
                    f"corpus.parts.{name}={corpus!r} is no corpus; expected the _target_ of one and its options, such "
                    "as {_target_: lmexp.corpus.files.Files, path: FILE}."
                )
            if corpus.streaming:
                raise UserError(
                    f"corpus.parts.{name} is streamed; parts are drawn by their sizes, which a stream does not tell. "
                    f"Set data.corpus.parts.{name}.streaming=false, with a slice if it is large: train='train[:1%]'."
                )
        for name in languages or {}:
            if name not in parts:
                raise UserError(f"corpus.languages.{name}: there is no such part; there are {', '.join(parts)}.")
        named = languages or {}
        self._parts = []
        for name, corpus in parts.items():
            if hasattr(corpus, "parts"):  # of pairs, say: its parts become ours
                self._parts += corpus.parts()
            else:
                self._parts.append(Part(str(name), (named.get(name, str(name)),), (corpus,)))
        names = [part.name for part in self._parts]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"corpus.parts has two parts called {name}; leave one of them out.")
        self.languages = tuple(dict.fromkeys(language for part in self._parts for language in part.languages))
        self.alpha = alpha
        if "train" not in self.splits:
            lacking = [part.name for part in self._parts if "train" not in part.corpora[0].splits]
            raise UserError(f"corpus.parts.{lacking[0]} has no train split; expected one to train on.")

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that every part has."""
        return tuple(split for split in _SPLITS if all(split in part.corpora[0].splits for part in self._parts))

    def parts(self) -> list[Part]:
        """The corpora, as they were given."""
        return list(self._parts)
