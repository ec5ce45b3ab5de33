"""Lightning's strategy for weights in pieces (FSDP2), with the checkpoints that every other strategy writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lmexp.optimizer.sharding import pieces_like, shares_of, whole_shape, whole_state
from lmexp.optimizer.tensor_parallel import share_of


class Sharded(ModelParallelStrategy):
    """One file holds everything, whole, so that it loads on any number of devices and without this strategy.

    Each process reads the file and keeps its pieces. `BaseTask.configure_model` does the sharding.
    """

    def __init__(self, data_parallel: int, tensor_parallel: int, process_group_backend: str | None) -> None:
        super().__init__(
            data_parallel_size=data_parallel,
            tensor_parallel_size=tensor_parallel,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return whole_state(self.lightning_module.state_dict(), shares_of(self.lightning_module))

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        whole = {n: whole_state(s, dict.fromkeys(s, share_of(parameters[n]))) for n, s in state["state"].items()}
        return {**state, "state": whole}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

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
    return isinstance(x, Tensor) and x.shape == whole_shape(p) and x.dim() > 0
