"""Lightning's strategy for weights in pieces (FSDP2), with the checkpoints that every other strategy writes."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lmexp.contracts import StorageError
from lmexp.optimizer.sharding import is_in_pieces, local, pieces_like, shares_of, whole_shape, whole_state
from lmexp.optimizer.tensor_parallel import Share, share_of
from lmexp.run import checkpoint as files
from lmexp.run.pieces import Piece, Whole, piece_file, taken_out


class Sharded(ModelParallelStrategy):
    """One file holds everything, whole, so that it loads on any number of devices and without this strategy; or, with
    `in_pieces`, each process writes what it has, which loads the same way.

    Each process reads all and keeps its pieces. `BaseTask.configure_model` does the sharding.
    """

    def __init__(
        self, data_parallel: int, tensor_parallel: int, in_pieces: bool, process_group_backend: str | None
    ) -> None:
        super().__init__(
            data_parallel_size=data_parallel,
            tensor_parallel_size=tensor_parallel,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
        )
        self.in_pieces = in_pieces
        self.groups = tensor_parallel
        """Devices of one copy of the model, which read the same."""

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.saved(self.lightning_module.state_dict(), shares_of(self.lightning_module))

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        saved = {n: self.saved(s, dict.fromkeys(s, share_of(parameters[n]))) for n, s in state["state"].items()}
        return {**state, "state": saved}

    def saved(self, state: Mapping[str, Any], like: Mapping[str, Share | None]) -> dict[str, Any]:
        """A state dict as a checkpoint holds it; `like`: how the tensors of a name are shared out. Collective."""
        if not self.in_pieces:
            return whole_state(state, like)
        return {name: _piece(x, like.get(name)) if is_in_pieces(x) else x for name, x in state.items()}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if not self.in_pieces:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path, of = Path(self.broadcast(filepath)), self.broadcast(uuid.uuid4().hex)
        mine = piece_file(path, self.global_rank, self.world_size)
        error: Exception | None = None
        try:
            own: dict[str, Tensor] = {}
            checkpoint = taken_out(checkpoint, own)
            files.save({"of": of, "tensors": own}, mine)
        except Exception as raised:
            error = raised
        self._all_or_none(error, path, mine)  # the checkpoint stands only where all of its pieces do
        checkpoint["pieces"] = {"processes": self.world_size, "groups": self.groups, "id": of}
        try:
            super().save_checkpoint(checkpoint, path, storage_options)
        except Exception as raised:
            error = raised
        self._all_or_none(error, path, mine)

    def _all_or_none(self, error: Exception | None, path: Path, mine: Path) -> None:
        """Raise on every process if any could not do its part, and keep no piece of what is no checkpoint."""
        failed = torch.tensor(int(error is not None), device=self.root_device)
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if failed and not path.exists():
            mine.unlink(missing_ok=True)
        if error is not None:
            raise error
        if failed:
            raise StorageError("Another process could not write its part of a checkpoint; it says why.")

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        read: Any = self.checkpoint_io
        content: dict[str, Any] = read.load_unread(checkpoint_path)
        return content

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        load_whole(self.lightning_module, checkpoint["state_dict"])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {
                    name: pieces_like(value.to(p.device), p) if _is_like(value, p) else value
                    for name, value in saved["state"][number].items()
                }
                for number, p in enumerate(parameters)
                if number in saved["state"]
            }
            optimizer.load_state_dict({**saved, "state": state})


def load_whole(module: torch.nn.Module, state: Mapping[str, Any]) -> None:
    """Put whole tensors into a module whose own may be in pieces. Raises as `load_state_dict` does."""
    own = dict(module.named_parameters(remove_duplicate=False))
    spread = dict(state)
    for name in own.keys() & state.keys():
        if _is_like(state[name], own[name]):
            spread[name] = pieces_like(state[name].to(own[name].device), own[name])
    module.load_state_dict(spread)


def _is_like(x: Any, p: Tensor) -> bool:
    return isinstance(x, (Tensor, Whole)) and x.shape == whole_shape(p) and len(x.shape) > 0


def _piece(x: Any, share: Share | None) -> Piece:
    whole = list(x.shape)
    if share is not None:
        whole[share.dim] = sum(share.spans)
    return Piece(local(x), tuple(whole), None if share is None else (share.dim, share.spans))
