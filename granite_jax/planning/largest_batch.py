"""The search for the largest batch that fits a chip."""

from collections.abc import Callable

STEP = 8  # rows that batches are multiples of


def largest_batch(fits: Callable[[int], bool], start: int) -> int:
    """The largest multiple of eight rows that fits; 0 if not even eight do.

    Doubles the rows from `start` until they do not fit, and then halves the interval. This takes for granted that what
    is smaller than a batch that fits does so, too.

    Args:
      fits: whether programs for so many rows fit; asked once for any number of rows.
      start: rows to begin with, rounded up to a multiple of eight. The nearer to the result, the fewer are asked for.
    """
    fitting, failing = 0, max(1, -(-start // STEP))  # in steps
    while fits(failing * STEP):
        fitting, failing = failing, 2 * failing
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        if fits(middle * STEP):
            fitting = middle
        else:
            failing = middle
    return fitting * STEP
