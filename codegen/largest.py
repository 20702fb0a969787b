"""The largest numbers of each row, and those in columns that were found, while the row is in registers: functions that
kernels call."""

from __future__ import annotations

HELPERS = {
    "top_of": """@triton.jit
def top_of(x, place, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    # Whole rows x; what is found stands at the places 0 .. COUNT of columns place. Of equal numbers the first is larger.
    # Columns are of different numbers even where these are -inf; for NaN, which is no number, it is the last one.
    column = tl.arange(0, x.shape[1])[None, :]
    left = (column < WIDTH) & (x == x)
    values = tl.zeros((x.shape[0], place.shape[1]), tl.float32)
    columns = tl.zeros((x.shape[0], place.shape[1]), tl.int32)
    for number in tl.static_range(COUNT):
        most = tl.max(tl.where(left, x, float("-inf")), 1)[:, None]
        found = tl.min(tl.where(left & (x == most), column, WIDTH - 1), 1)[:, None]
        values = tl.where(place == number, most, values)
        columns = tl.where(place == number, found, columns)
        left = left & (column != found)
    return values, columns
""",
    "picked": """@triton.jit
def picked(x, index, place, COUNT: tl.constexpr):
    # The numbers of whole rows x in the columns index, of which COUNT stand at the places 0 .. COUNT of columns place.
    column = tl.arange(0, x.shape[1])[None, :]
    values = tl.zeros((x.shape[0], place.shape[1]), tl.float32)
    for number in tl.static_range(COUNT):
        wanted = tl.sum(tl.where(place == number, index, 0), 1)[:, None]
        found = tl.sum(tl.where(column == wanted, x, 0.0), 1)[:, None]
        values = tl.where(place == number, found, values)
    return values
""",
}
