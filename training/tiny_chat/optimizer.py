"""Muon for the matrices, Adam for the embeddings and the norms; full-precision weights behind a bfloat16 network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training.tiny_chat.network import Network

_MOMENTUM = 0.95
_BETAS = (0.9, 0.98)


def orthogonalize(stack: Tensor) -> Tensor:
    """Newton-Schulz iterations that push every singular value of a stack of wide matrices towards one."""
    x = stack.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.float()


class Optimizer:
    """Updates a bfloat16 network through full-precision masters."""

    def __init__(
        self, network: Network, *, matrix_rate: float, vector_rate: float, decay: float = 0.05
    ) -> None:
        self.matrix_rate, self.vector_rate, self.decay = matrix_rate, vector_rate, decay
        self.masters = {name: p.detach().float().clone() for name, p in network.named_parameters()}
        network.bfloat16()
        network.inverse = network.inverse.float()
        self.parameters = dict(network.named_parameters())
        self.matrices: dict[tuple[int, ...], list[str]] = {}
        self.vectors: list[str] = []
        for name, p in self.parameters.items():
            if p.dim() == 2 and "embed" not in name:
                self.matrices.setdefault(tuple(sorted(p.shape)), []).append(name)
            else:
                self.vectors.append(name)
        self.first = {name: torch.zeros_like(p) for name, p in self.masters.items()}
        self.second = {name: torch.zeros_like(self.masters[name]) for name in self.vectors}
        self.steps = 0

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Apply the gradients at this share of the full rate, and clear them."""
        self.steps += 1
        for names in self.matrices.values():
            self._step_matrices(names, self.matrix_rate * factor)
        for name in self.vectors:
            self._step_vector(name, self.vector_rate * factor)
        for name, parameter in self.parameters.items():
            parameter.copy_(self.masters[name])
            parameter.grad = None

    def _step_matrices(self, names: list[str], rate: float) -> None:
        updates = []
        for name in names:
            gradient = self._gradient(name)
            self.first[name].lerp_(gradient, 1 - _MOMENTUM)
            update = gradient.lerp(self.first[name], _MOMENTUM)
            updates.append(update if update.shape[0] <= update.shape[1] else update.T)
        for name, update in zip(names, orthogonalize(torch.stack(updates)), strict=True):
            master = self.masters[name]
            rows, columns = master.shape
            wide = update if rows <= columns else update.T
            master.mul_(1 - rate * self.decay).add_(wide, alpha=-rate * max(1.0, rows / columns) ** 0.5)

    def _step_vector(self, name: str, rate: float) -> None:
        gradient = self._gradient(name)
        first, second = self.first[name], self.second[name]
        first.lerp_(gradient, 1 - _BETAS[0])
        second.lerp_(gradient * gradient, 1 - _BETAS[1])
        mean = first / (1 - _BETAS[0] ** self.steps)
        spread = (second / (1 - _BETAS[1] ** self.steps)).sqrt() + 1e-9
        self.masters[name].add_(mean / spread, alpha=-rate)

    def _gradient(self, name: str) -> Tensor:
        gradient = self.parameters[name].grad
        assert gradient is not None
        return gradient.float()

    def state(self) -> dict[str, Any]:
        """Everything that a later ``load`` needs to go on."""
        return {"masters": self.masters, "first": self.first, "second": self.second, "steps": self.steps}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.masters, self.first, self.second, self.steps = (
            state[k] for k in ("masters", "first", "second", "steps")
        )
        for name, parameter in self.parameters.items():
            parameter.copy_(self.masters[name])
