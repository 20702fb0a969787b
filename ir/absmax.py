"""The largest magnitudes of rows, of which a rank may have parts: whole rows are rounded by them."""

from __future__ import annotations

from torch import Tensor

from .ops import register


@register("nn.absmax")
def absmax(x: Tensor, parts: int = 1, divisors: Tensor | None = None) -> Tensor:
    """The largest magnitude in each of so many equal parts of the rows ``x [..., K]``: ``f32 [..., parts]``.

    With ``divisors f32 [K]`` it is that of the rows over them, in fp32. ``nn.quantize`` takes the result in place of looking
    for the largest magnitude of its rows itself.
    """
    wide = x.float() if divisors is None else x.float() / divisors
    return wide.reshape(*x.shape[:-1], parts, x.shape[-1] // parts).abs().amax(-1)
