"""Batches from samples: endless in training, each a pure function of the sample indices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from lmexp.contracts import Batch, Objective, Sample

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


class Samples(Protocol):
    """Anything that has samples by index."""

    def samples(self, indices: Sequence[int]) -> list[Sample]: ...


class Collated:
    """A map-style data set whose items are whole batches, by the list of their sample indices."""

    def __init__(self, source: Samples, objective: Objective, block_size: int) -> None:
        self.source = source
        self.objective = objective
        self.block_size = block_size

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        return self.objective.collate(self.source.samples(indices), self.block_size)


class Batches:
    """The batches of these lists of indices, made here or by worker processes; iterating again starts again.

    Without a length, so that nothing downstream plans epochs of it.
    """

    def __init__(
        self,
        collated: Collated,
        indices: Callable[[], Iterable[Sequence[int]]],
        num_workers: int,
        prefetch: int,
        pin_memory: bool,
    ) -> None:
        """`prefetch` batches are made ahead by each worker; `indices` gives the lists anew for each pass."""
        self.collated = collated
        self.indices = indices
        self.num_workers = num_workers
        self.prefetch = prefetch
        self.pin_memory = pin_memory

    def __iter__(self) -> Iterator[Batch]:
        if self.num_workers:
            yield from self._loader()
            return
        for indices in self.indices():
            batch = self.collated[indices]
            yield pinned(batch) if self.pin_memory else batch

    def _loader(self) -> DataLoader[Any]:
        import torch
        from torch.utils.data import DataLoader

        return DataLoader(
            self.collated,  # type: ignore[arg-type]
            batch_size=None,  # a sampler item is a whole batch already
            sampler=self.indices(),
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # else every pass would draw from the global random state
        )


class SizedBatches(Batches):
    """The same for a split that ends: it has a length."""

    def __len__(self) -> int:
        return len(self.indices())  # type: ignore[arg-type]


def pinned(batch: Batch) -> Batch:
    """The batch in page-locked memory, from where a GPU copies while it computes."""
    return {
        "inputs": {name: value.pin_memory() for name, value in batch["inputs"].items()},
        "labels": batch["labels"].pin_memory(),
        "n_bytes": batch["n_bytes"].pin_memory(),
    }
