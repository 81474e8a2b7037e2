"""Where HART's tokens are: rotary tables of text tokens by their number, of image tokens by row and column after the text.

Every scale's coordinates run from 0 toward the side of the last one, and begin where the row's own text ends. Numbers i and
i + c/2 of a head turn together; of image tokens the first takes the angle of y and the second that of x, which is no rotation
(a quirk that the weights were trained with), so lengths have to be made equal before and not after.

Source: mit-han-lab/hart, hart/modules/networks/basic_hart.py (facts only). Differs in that tables are made once per scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Base of the rotary frequencies.
_THETA = 10000.0


def turn_halves(x_RHLc: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """x * cos + (-second half, first half) * sin, with tables (R, 1, L, c)."""
    cos, sin = cos_sin
    first, second = x_RHLc.chunk(2, dim=-1)
    return x_RHLc * cos + torch.cat([-second, first], dim=-1) * sin


def _tables(angle_RLc: Tensor) -> tuple[Tensor, Tensor]:
    return angle_RLc.cos()[:, None], angle_RLc.sin()[:, None]


def _frequency(head_dim: int, stride: int, device: torch.device) -> Tensor:
    return 1.0 / _THETA ** (torch.arange(0, head_dim, stride, dtype=torch.float32, device=device) / head_dim)


class Turning:
    """Rotary tables of one scale's tokens, made once for all layers with the same positions.

    Args:
        coordinates_L2: y and x of every raster position.
        offset_R: place of each row's last text token, where its images' places begin.
        head_dim: c.
    """

    def __init__(self, coordinates_L2: Tensor, offset_R: Tensor, head_dim: int):
        self._coordinates, self._offset, self._head_dim = coordinates_L2, offset_R, head_dim
        self._last: tuple[Tensor | None, tuple[Tensor, Tensor]] | None = None

    def at(self, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and sin (R, 1, L, c) of these raster positions, as a site gives them."""
        if self._last is None or self._last[0] is not positions:
            coordinates = self._coordinates if positions is None else self._coordinates[positions]
            place_RL2 = coordinates + self._offset[:, None, None]  # coordinates are (L, 2), or (R, L, 2) of rows apart
            angle_RL2q = place_RL2[..., None] * _frequency(self._head_dim, 4, place_RL2.device)
            self._last = positions, _tables(torch.cat([angle_RL2q, angle_RL2q], dim=-1).flatten(2))
        return self._last[1]


class TextTurning:
    """Rotary tables of the text tokens, by their places (R, T)."""

    def __init__(self, place_RT: Tensor, head_dim: int):
        angle_RTh = place_RT[..., None] * _frequency(head_dim, 2, place_RT.device)
        self._whole = _tables(torch.cat([angle_RTh, angle_RTh], dim=-1))

    def at(self, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and sin (R, 1, T, c)."""
        assert positions is None, "the first scale is never reduced"
        return self._whole
