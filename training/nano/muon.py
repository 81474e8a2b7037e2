"""Muon in float32: torch.optim.Muon orthogonalizes in bfloat16, which takes 20 times longer on CPUs without bfloat16 products.

Source: Jordan et al. 2024 (Muon) as implemented by torch.optim.Muon: Nesterov momentum as an exponential average, five
quintic Newton-Schulz iterations, rate scaled by sqrt(max(1, rows / columns)). Differs in precision only.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalized(matrix_MN: Tensor) -> Tensor:
    """A matrix (M, N) of about the same singular vectors whose singular values lie near 1, float32."""
    a, b, c = _COEFFICIENTS
    x = matrix_MN.float()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for matrices, without weight decay. State per parameter: `momentum_buffer`."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                average = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalized(parameter.grad.lerp(average, group["momentum"]))
                rate = group["lr"] * max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
                parameter.add_(update.to(parameter.dtype), alpha=-rate)
