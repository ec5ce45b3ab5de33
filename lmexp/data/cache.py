"""The token cache: a corpus is tokenized once, by one process, into memory-mapped files.

    <cache_dir>/tokenizers/<key>/tokenizer.json    key: corpus fingerprint, settings
    <cache_dir>/tokens/<key>/                      key: corpus fingerprint, tokenizer fingerprint, splits, format
        train.bin, validation.bin, ...             token ids, uint16 or uint32
        train.offsets.npy, ...                     (documents + 1,) int64: where each document's first token stands
        manifest.json                              sizes and the data report; written last

A stream begins with a document end, and every document is followed by one, so that each token of text is predicted
once. What is being built lies in `<key>.tmp` until it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lmexp.contracts import Corpus, Split, UserError
from lmexp.data.packing import TokenFile
from lmexp.data.report import DataReport, SplitReport
from lmexp.tokenizer.tokenizer import Tokenizer, TokenizerConfig

if TYPE_CHECKING:
    from rich.console import Console

_FORMAT = 2
_BATCH = 2**22  # characters that are encoded at once: enough for every thread, little to hold
_SAMPLE = 200  # tokens shown in the report
_WORD = re.compile(r"\w+")


class SplitCorpus(Corpus, Protocol):
    """A corpus that says which splits it has."""

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits there are, without reading them."""
        ...


class TokenCache:
    """An open token cache. Opening reads the manifest only, however large the data are."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.report = DataReport.from_dict(manifest["report"], str(path))
        self._dtype = manifest["dtype"]

    def stream(self, split: str) -> TokenFile:
        """The tokens of a split; `UserError` if the corpus has no such split."""
        if split not in self.report.splits:
            raise UserError(
                f"The corpus has no {split} split; it has {', '.join(self.report.splits)}. "
                "Choose one of these, or give the corpus such a split."
            )
        return TokenFile(self.path / f"{split}.bin", self._dtype, self.report.splits[split].tokens)

    def offsets(self, split: str) -> np.ndarray:
        """(documents + 1,) int64, memory-mapped: document i is the tokens offsets[i] to offsets[i + 1] - 1, the last
        of which, at offsets[i + 1] - 1, ends it."""
        return np.load(self.path / f"{split}.offsets.npy", mmap_mode="r")


def trained_tokenizer(
    config: TokenizerConfig, corpus: Corpus, cache_dir: str | Path, console: Console | None = None
) -> Tokenizer:
    """The tokenizer of these settings, trained on the corpus's training split once and kept."""
    if not config.needs_text:
        return config.train(iter(()))
    folder = Path(cache_dir) / "tokenizers" / _key(corpus.fingerprint(), config.key)
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.load(folder)
    with _building(folder, console):
        if not (folder / "tokenizer.json").is_file():
            progress = console is not None and console.is_terminal
            tokenizer = config.train(texts(corpus.rows("train")), progress=progress)
            _write_atomically(folder / "tokenizer.json", tokenizer.to_json())
    return Tokenizer.load(folder)


def open_cache(
    corpus: Corpus,
    tokenizer: Tokenizer,
    splits: Sequence[Split],
    cache_dir: str | Path,
    console: Console | None = None,
) -> TokenCache:
    """The token cache of these splits, built if there is none; of many processes at once, one builds.

    `console` shows the progress; None: silent. Raises `UserError` if a split is empty or the disk cannot take it.
    """
    key = _key(_FORMAT, corpus.fingerprint(), tokenizer.fingerprint(), sorted(splits))
    path = Path(cache_dir) / "tokens" / key
    manifest = _read_manifest(path)
    if manifest is None or _damage(path, manifest):
        with _building(path, console):
            manifest = _read_manifest(path)
            damage = manifest and _damage(path, manifest)
            if damage and console is not None:
                console.print(f"The token cache {path} is damaged ({damage}); building it again.")
            if manifest is None or damage:
                manifest = _build(path, corpus, tokenizer, splits, console)
    return TokenCache(path, manifest)


def texts(rows: Any) -> Iterator[str]:
    """The documents of a `datasets` object, empty ones left out."""
    for batch in rows.iter(batch_size=256):
        yield from (text for text in batch["text"] if text)


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def _building(path: Path, console: Console | None) -> Iterator[None]:
    """Hold the lock on building `path`; what the disk refuses becomes a `UserError`."""
    from filelock import FileLock, Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")  # the system takes it from a process that dies
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if console is not None:
                console.print(f"Another process is building {path}; waiting for it.")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
    except OSError as error:
        if not error.filename and error.errno is None:
            raise
        raise UserError(
            f"Cannot write the cache {path}: {error.strerror or error}. Free some space there, or put the cache "
            "elsewhere with data.cache_dir=FOLDER."
        ) from error


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a built cache; None if there is none, which is also what a damaged one counts as."""
    try:
        return json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _damage(path: Path, manifest: dict[str, Any]) -> str:
    """What is wrong with the files of a cache, judged by their sizes; empty if nothing is."""
    for name, expected in manifest["files"].items():
        try:
            size = (path / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != expected:
            return f"{name} has {size} bytes instead of {expected}"
    return ""


def _build(
    path: Path, corpus: Corpus, tokenizer: Tokenizer, splits: Sequence[Split], console: Console | None
) -> dict[str, Any]:
    unfinished = path.with_name(f"{path.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a build that was killed: we hold the lock
    unfinished.mkdir()
    try:
        reports: dict[str, SplitReport] = {}
        sample = ""
        for split in splits:
            reports[split], start = _write_split(unfinished, split, corpus.rows(split), tokenizer, console)
            sample = sample or tokenizer.decode(start)
        report = DataReport(reports, tokenizer.vocab_size, sample, str(path))
        manifest = {
            "dtype": np.dtype(tokenizer.dtype).name,
            "files": {file.name: file.stat().st_size for file in sorted(unfinished.iterdir())},
            "report": report.to_dict(),
        }
        _write_atomically(unfinished / "manifest.json", json.dumps(manifest, indent=1))
        shutil.rmtree(path, ignore_errors=True)
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return manifest


def _write_split(
    folder: Path, split: str, rows: Any, tokenizer: Tokenizer, console: Console | None
) -> tuple[SplitReport, np.ndarray]:
    """Write the tokens and offsets of a split; returns its counts and the first tokens of its first document."""
    eos = np.array([tokenizer.eos_id], dtype=tokenizer.dtype)
    start = eos[:0]
    lengths: list[np.ndarray] = []
    n_bytes = unknown = words = fragments = 0
    is_fragment = tokenizer.fragments
    with open(folder / f"{split}.bin", "wb") as file:
        file.write(eos.tobytes())
        for batch in _batches(_tracked(rows, split, console)):
            documents = tokenizer.encode(batch)
            if not len(start):
                start = documents[0][:_SAMPLE]
            stream = np.concatenate([part for document in documents for part in (document, eos)])
            file.write(stream.tobytes())
            lengths.append(np.array([len(document) for document in documents], dtype=np.int64))
            n_bytes += sum(len(text.encode()) for text in batch)
            words += sum(len(_WORD.findall(text)) for text in batch)
            fragments += int(is_fragment[stream].sum())
            unknown += 0 if tokenizer.unk_id is None else int((stream == tokenizer.unk_id).sum())
        file.flush()
        os.fsync(file.fileno())
    if not lengths:
        raise UserError(
            f"The {split} split of the corpus holds no text; expected at least one document. Give it more text, or "
            "another fraction or source for this split."
        )
    sizes = np.concatenate(lengths)
    offsets = np.ones(len(sizes) + 1, dtype=np.int64)
    offsets[1:] += np.cumsum(sizes + 1)
    with open(folder / f"{split}.offsets.npy", "wb") as file:
        np.save(file, offsets)
        file.flush()
        os.fsync(file.fileno())
    return SplitReport(len(sizes), int(offsets[-1]), n_bytes, unknown, int(sizes.max()), words, fragments), start


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tracked(rows: Any, split: str, console: Console | None) -> Iterator[str]:
    """The documents of a split under a progress bar, where there is a terminal to show it."""
    if console is None or not console.is_terminal:
        yield from texts(rows)
        return
    from rich.progress import track

    total = len(rows) if hasattr(rows, "__len__") else None
    yield from track(texts(rows), f"tokenizing {split}", total=total, console=console, transient=True)


def _write_atomically(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
