"""Batches from samples: endless in training, each a pure function of the sample indices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, cast

from lmexp.contracts import Batch, Collate, Family, Objective, Sample
from lmexp.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import DataLoader


def data_share(trainer: Any) -> tuple[int, int]:
    """Which share of the batch this device gets, and of how many: devices that share out the model itself
    (`tensor_parallel`) get the same."""
    groups = getattr(trainer.strategy, "groups", 1)
    return trainer.global_rank // groups, trainer.world_size // groups


def data_group(trainer: Any) -> Any:
    """The devices that share out a batch, one of each model; None: all. Not before they are connected."""
    if getattr(trainer.strategy, "groups", 1) == 1:
        return None
    return trainer.strategy.device_mesh["data_parallel"].get_group()


class Samples(Protocol):
    """Anything that has samples by index."""

    def samples(self, indices: Sequence[int]) -> list[Sample]: ...


@dataclass
class Recipe:
    """How samples become a batch; sent to a worker process as what it is made of."""

    objective: Objective
    tokenizer: Tokenizer
    family: Family
    block_size: int
    seed: int
    """Of the objective's noise."""

    start_id: int | None = None
    """The token that an encoder-decoder's decoder begins with; None: the tokenizer's padding."""

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        return self._collate(samples, self.block_size, self.seed)

    @cached_property
    def _collate(self) -> Collate:
        return self.objective.collate(self.tokenizer, self.family, self.start_id)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_collate"}


class Collated:
    """A map-style data set whose items are whole batches, by the list of their sample indices."""

    def __init__(self, source: Samples, recipe: Recipe) -> None:
        self.source = source
        self.recipe = recipe

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        return self.recipe(self.source.samples(indices))


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
    return each_tensor(batch, lambda tensor: tensor.pin_memory())


def each_tensor(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with every tensor changed."""
    rest = {name: change(value) for name, value in batch.items() if name != "inputs"}  # type: ignore[arg-type]
    return cast(Batch, {"inputs": {name: change(value) for name, value in batch["inputs"].items()}, **rest})
