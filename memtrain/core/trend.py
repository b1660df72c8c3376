"""A smooth running level of a score over the timestep, for few observations of a changing model."""

from __future__ import annotations

import torch
from torch import Tensor

_RIDGE = 1e-3  # in observations; keeps the fit defined before there are as many as coefficients


class Trend:
    """A polynomial of the timestep, fitted by least squares with exponential forgetting.

    A bin's own mean rests on its own few observations; the level of log d is smooth in t, so that a handful
    of coefficients, fitted to all observations, follow it with a third of the noise. Values that are not finite
    are passed over.

    Args:
        degree: of the polynomial, in the Chebyshev basis.
        half_life: observations after which an older one counts half.
    """

    def __init__(self, degree: int, half_life: float):
        self.degree, self.decay = degree, 0.5 ** (1 / half_life)
        self.sums = torch.zeros(degree + 2, degree + 2, dtype=torch.float64)  # of (1, ..., T_degree, value), squared

    def _basis(self, position: Tensor) -> Tensor:
        """Chebyshev polynomials at positions in [0, 1). (B,) -> (B, degree + 1)"""
        angle = (2 * position.cpu().double() - 1).clamp(-1, 1).acos()
        return torch.cos(angle[:, None] * torch.arange(self.degree + 1))

    def update(self, values: Tensor, position: Tensor) -> None:
        """Learn from all observations of one step. values (B,), position (B,): timesteps as a share of the schedule"""
        finite = values.isfinite()
        # (B, degree + 2): basis and value; their products, summed over rows, are the normal equations
        rows = torch.cat([self._basis(position[finite]), values[finite].cpu().double()[:, None]], dim=1)
        self.sums = self.sums * self.decay ** len(rows) + rows.T @ rows

    @property
    def count(self) -> float:
        """Effective number of observations."""
        return self.sums[0, 0].item()

    def at(self, position: Tensor) -> Tensor:
        """The level at positions in [0, 1). (B,) -> (B,) float64"""
        normal = self.sums[:-1, :-1] + _RIDGE * torch.eye(self.degree + 1)
        return self._basis(position) @ torch.linalg.solve(normal, self.sums[:-1, -1])
