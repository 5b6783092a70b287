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
        guess = _next(measured, limit, fixed_bytes)
        if not left and min(measured.values()) > limit:
            guess = 1
        if guess in measured:
            break
        measured[guess] = total_bytes(guess)
    fitting = max((batch for batch, needs in measured.items() if needs <= limit), default=0)
    return fitting, measured[fitting or min(measured)]


def _next(measured: dict[int, int], limit: int, fixed: int) -> int:
    """What to measure next; a batch that was measured already where that is the answer.

    The largest batch within the limit on the line through the two measurements on both sides of it: near it a compiler
    saves memory, so that a line through two on one side leads far astray. Where there is one side, on its line, but to
    no more than eight times the largest of the two.
    """
    fitting = [batch for batch, needs in sorted(measured.items()) if needs <= limit]
    too_large = [
        batch for batch, needs in sorted(measured.items()) if needs > limit and batch > max(fitting, default=0)
    ]
    if len(measured) == 1:  # a second point, on the side where the answer is, as if all else grew with the batch
        (only,) = measured
        guess = int((limit - fixed) * only / max(1, measured[only] - fixed))
        return min(max(guess, only + 1), 64 * only) if fitting else max(1, min(guess, only - 1))
    low, high = [*fitting[-1:], *too_large[:1]] if fitting and too_large else [*fitting[-2:], *too_large[:2]]
    slope = max(1.0, (measured[high] - measured[low]) / (high - low))
    guess = int(low + (limit - measured[low]) // slope)
    return max(1, min(guess, too_large[0] - 1 if too_large else 8 * high))
