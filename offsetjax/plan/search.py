"""The largest batch that fits, by few compilations: what a step takes is nearly affine in its batch."""

from collections.abc import Callable


def largest_batch(
    total_bytes: Callable[[int], int],
    limit: int,
    first: int,
    first_bytes: int,
    fixed_bytes: int = 0,
    most_tries: int = 6,
) -> tuple[int, int]:
    """The largest batch whose bytes are within the limit, and those bytes; 0 and the bytes of 1 where none fits.

    The answer was measured, 1 too where that is said not to fit. That the next larger batch does not fit was measured
    as well, or follows from the line through the last two measurements; or the measurements were used up.

    Args:
        total_bytes: measures one batch; it may take minutes.
        first: a batch that was measured, as `first_bytes`.
        fixed_bytes: of these, what no batch changes, such as weights; a good guess saves measurements.
        most_tries: further measurements.
    """
    measured = {first: first_bytes}
    for left in reversed(range(most_tries)):
        fitting = max((batch for batch, needs in measured.items() if needs <= limit), default=0)
        too_large = min((batch for batch, needs in measured.items() if needs > limit), default=None)
        guess = _next(measured, limit, fixed_bytes)
        if guess <= fitting or (too_large is not None and fitting + 1 == too_large):
            break
        if too_large is not None:
            guess = min(guess, too_large - 1) if fitting or left else 1
        measured[guess] = total_bytes(guess)
    fitting = max((batch for batch, needs in measured.items() if needs <= limit), default=0)
    return fitting, measured[fitting or min(measured)]


def _next(measured: dict[int, int], limit: int, fixed: int) -> int:
    """The largest batch within the limit on the line through the two measurements nearest to it."""
    nearest = sorted(measured, key=lambda batch: abs(measured[batch] - limit))[:2]
    if len(nearest) == 1:  # a second point, on the side where the answer is, as if all else grew with the batch
        (only,) = nearest
        guess = int((limit - fixed) * only / max(1, measured[only] - fixed))
        return min(max(guess, only + 1), 64 * only) if measured[only] <= limit else max(1, min(guess, only - 1))
    low, high = sorted(nearest)
    slope = max(1.0, (measured[high] - measured[low]) / (high - low))
    return max(1, int(low + (limit - measured[low]) // slope))
