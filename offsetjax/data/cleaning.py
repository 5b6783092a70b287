"""Pictures that a build leaves out by choice: too small, too long, animated, or there twice; each is counted.

What is broken is left out without being asked, and is limited by `--max_dropped`; what is here is not.
"""

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image

from offsetjax.data.images import FORMATS
from offsetjax.data.items import Dropped
from offsetjax.errors import UserError

_SMALL, _LONG, _ANIMATED, _TWICE = "too small", "too long", "animated", "there twice"
CHOSEN = (_SMALL, _LONG, _ANIMATED, _TWICE)  # how the reasons begin
_MOVING = ("GIF", "PNG", "WEBP")  # other formats have pages, or a second view


@dataclass(frozen=True)
class Cleaning:
    """What is left out by choice; by default nothing.

    Attributes:
        min_side: of a picture's shorter side, in pixels; 0: any.
        max_aspect: of the longer side over the shorter one; 0: any.
        drop_animated: whether animations are left out; else their first frame is taken.
        drop_duplicates: whether of pictures of the same pixels the first alone is taken.
    """

    min_side: int = 0
    max_aspect: float = 0.0
    drop_animated: bool = False
    drop_duplicates: bool = False

    def __post_init__(self) -> None:
        if self.min_side < 0:
            raise UserError(f"data: --min_side={self.min_side} must be at least 0")
        if self.max_aspect != 0 and not 1 <= self.max_aspect < float("inf"):
            raise UserError(f"data: --max_aspect={self.max_aspect:g} must be at least 1, or 0 for any")

    def check_size(self, height: int, width: int) -> None:
        """Raises `Dropped` for a picture of a size that is left out."""
        if min(height, width) < self.min_side:
            raise Dropped(f"{_SMALL}: {width}x{height} has a side below --min_side={self.min_side}")
        if self.max_aspect and max(height, width) > self.max_aspect * min(height, width):
            raise Dropped(f"{_LONG}: {width}x{height} is beyond --max_aspect={self.max_aspect:g}")

    def check_file(self, data: bytes) -> None:
        """Raises `Dropped` for an animation, where these are left out; a file that can be decoded."""
        if not self.drop_animated:
            return
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.format in _MOVING and getattr(image, "n_frames", 1) > 1:
                raise Dropped(f"{_ANIMATED}: it has {image.n_frames} frames")  # type: ignore[attr-defined]

    def digest(self, data: bytes) -> str:
        """What a picture is known again by: its pixels, whatever the file; "" where duplicates are kept."""
        if not self.drop_duplicates:
            return ""
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            rgb = image.convert("RGB")
            return hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest()[:32]


def is_chosen(reason: str) -> bool:
    """Whether something was left out by choice."""
    return reason.partition(":")[0] in CHOSEN


def duplicates(shards: Iterable[Sequence[tuple[str, int, str]]]) -> list[dict[int, str]]:
    """Of each shard, the places of pictures that were there before, and why they are left out.

    Args:
        shards: of each kept picture its name, its place among the shard's items and its digest, in their order.
    """
    first: dict[str, str] = {}
    found = []
    for shard in shards:
        twice: dict[int, str] = {}
        for name, place, digest in shard:
            if digest in first:
                twice[place] = f"{_TWICE}: it has the pixels of {first[digest]}"
            else:
                first[digest] = name
        found.append(twice)
    return found
