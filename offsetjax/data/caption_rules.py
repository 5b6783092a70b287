"""What becomes of a caption in training: which of several, its tags shuffled and dropped, words before and after it.

Each is a function of (seed, place of the example in the training's order), so that a run that resumes, on any number of
processes, has the captions of one that was not interrupted. No rule's draws depend on another rule: with tags dropped
they are in the order that they have without.

    several → template → tags: trigger word, shuffle, dropout → prefix, suffix

The whole caption is dropped later, with all that these have put before and after it: `encode.caption_dropout`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

_STREAM = 5  # of the seed; 4 is that of the flips


@dataclass(frozen=True)
class CaptionRules:
    """What is done to captions; by default they are left as they are, the first of several.

    Attributes:
        several: which of a record's captions is shown: the first, or one that is drawn.
        weights: of the captions by their places, with which they are drawn; those beyond have the last one's; (): all
            alike.
        templates: one is drawn, and `{caption}` in it is the caption; (): none.
        trigger: a tag that is put before the others, unless the caption has it; it is neither moved nor dropped.
        separator: between two tags.
        shuffle_tags: whether tags are put in an order that is drawn.
        tag_dropout: the fraction of tags that are left out.
        keep_tags: the first tags of a caption, which are neither moved nor dropped.
        prefix, suffix: what is put before and after the caption, as it is.
        is_fixed: nothing may be drawn, see `without_draws`.
    """

    several: Literal["first", "draw"] = "first"
    weights: tuple[float, ...] = ()
    templates: tuple[str, ...] = ()
    trigger: str = ""
    separator: str = ","
    shuffle_tags: bool = False
    tag_dropout: float = 0.0
    keep_tags: int = 0
    prefix: str = ""
    suffix: str = ""
    is_fixed: bool = False

    @property
    def draws(self) -> bool:
        """Whether the caption of an example is another at another place."""
        return self.several == "draw" or len(self.templates) > 1 or self.shuffle_tags or self.tag_dropout > 0

    def without_draws(self) -> "CaptionRules":
        """The same with nothing drawn, as a validation shows captions: the first caption, the first template."""
        fixed = replace(self, several="first", weights=(), templates=self.templates[:1])
        return replace(fixed, shuffle_tags=False, tag_dropout=0.0, keep_tags=0, is_fixed=True)

    def changed(self, changes: Mapping[str, Any]) -> "CaptionRules":
        """The same with the rules of one data set among several."""
        rules = replace(self, **changes)
        return rules.without_draws() if self.is_fixed else rules

    def caption(self, captions: Sequence[str], seed: int, place: int) -> str:
        """The caption of the example at a place of the training's order; an empty one stays empty.

        Args:
            captions: of its record, at least one.
        """
        random = np.random.default_rng((seed, _STREAM, place)) if self.draws else None
        which, template = random.random(2) if random else (0.0, 0.0)
        caption = captions[self._drawn(len(captions), which)] if self.several == "draw" else captions[0]
        if not caption.strip():
            return caption
        if self.templates:
            caption = self.templates[int(template * len(self.templates))].replace("{caption}", caption)
        if self.shuffle_tags or self.tag_dropout or self.trigger:
            caption = self._tagged(caption, random)
        return f"{self.prefix}{caption}{self.suffix}"

    def _drawn(self, count: int, draw: float) -> int:
        """The caption of `count` that a number between 0 and 1 stands for; the first where all have no weight."""
        given = self.weights or (1.0,)
        weights = np.array([*given, *given[-1:] * count][:count])
        if not weights.sum():
            return 0
        return int(np.searchsorted(np.cumsum(weights) / weights.sum(), draw, side="right").clip(0, count - 1))

    def _tagged(self, caption: str, random: np.random.Generator | None) -> str:
        tags = [tag for part in caption.split(self.separator) if (tag := part.strip())]
        kept = self.keep_tags
        if self.trigger:
            kept = max(1, kept + (self.trigger not in tags[:kept]))
            tags = [self.trigger, *(tag for tag in tags if tag != self.trigger)]
        first, rest = tags[:kept], tags[kept:]
        if random and rest:
            order, dropped = random.random((2, len(rest)))
            places = np.argsort(order) if self.shuffle_tags else np.arange(len(rest))
            rest = [rest[place] for place in places if dropped[place] >= self.tag_dropout]
        joint = self.separator if self.separator.endswith((" ", "\n")) else f"{self.separator} "
        return joint.join([*first, *rest])
