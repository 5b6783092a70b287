"""Two layouts of one model: the original code's, which files for ComfyUI have too, and diffusers'.

A layout is a list of rules, `original → diffusers`, with `{}` for a block's number. Where diffusers has several tensors
for one of the original's, they are its rows, one after the other, in equal parts: fused queries, keys and values.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from offsetjax.errors import UserError
from offsetjax.formats.tensors import Tensor, concatenated, rows

PREFIX = "model.diffusion_model."  # of a denoiser in a file with other parts; ComfyUI's files of one part may have it


@dataclass(frozen=True)
class Rule:
    """One tensor of the original's, or one of each block.

    Attributes:
        is_swapped: whether the halves of its rows are the other way round in diffusers (a shift before a scale).
    """

    original: str
    diffusers: tuple[str, ...]
    is_swapped: bool = False


@dataclass(frozen=True)
class Layout:
    """The names of a model's tensors in both layouts.

    Attributes:
        rules: all of its tensors, or those that differ; what no rule names has one name.
        ignored: of the original's, what the model does not use.
    """

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()

    def to_diffusers(self, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """The tensors of a file of the original code or of ComfyUI, with or without the prefix, fused or not.

        Args:
            where: what an error begins with.

        Raises:
            UserError: a fused tensor does not divide.
        """
        result: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            name = name.removeprefix(PREFIX)
            if name in self.ignored:
                continue
            rule, block = self._rule_of(name)
            if rule is None:
                result[name] = tensor
                continue
            parts = len(rule.diffusers)
            if tensor.shape[0] % (2 * parts if rule.is_swapped else parts):
                raise UserError(
                    f"{where}: {name} has {tensor.shape[0]} rows, which are not {parts} of a size; fetch it again"
                )
            each = tensor.shape[0] // parts
            for place, other in enumerate(rule.diffusers):
                part = tensor if parts == 1 else rows(tensor, place * each, (place + 1) * each)
                result[other.format(block)] = _swapped(part) if rule.is_swapped else part
        return result

    def to_original(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse, without a prefix; a fused tensor of which parts are missing is left out."""
        result = dict(tensors)
        for rule, block in self._present(tensors):
            names = [name.format(block) for name in rule.diffusers]
            parts = [result.pop(name) for name in names]
            whole = parts[0] if len(parts) == 1 else concatenated(parts)
            result[rule.original.format(block)] = _swapped(whole) if rule.is_swapped else whole
        return result

    def layers(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """The original's name of each layer with a weight → diffusers' layers in it, of those that are given."""
        weights = {f"{name}.weight" for name in names}
        found = {
            rule.original.format(block).removesuffix(".weight"): tuple(
                name.format(block).removesuffix(".weight") for name in rule.diffusers
            )
            for rule, block in self._present(weights)
        }
        named = {name for each in found.values() for name in each}
        return found | {name: (name,) for name in names if name not in named}

    def _present(self, names: Iterable[str]) -> Iterator[tuple[Rule, str]]:
        names = set(names)
        blocks = sorted({number for name in names for number in re.findall(r"\.(\d+)\.", name)}, key=int)
        for rule in self.rules:
            for block in blocks if "{}" in rule.original else ("",):
                if all(name.format(block) in names for name in rule.diffusers):
                    yield rule, block

    def _rule_of(self, name: str) -> tuple[Rule | None, str]:
        for pattern, rule in self._patterns:
            if match := pattern.fullmatch(name):
                return rule, "".join(match.groups())
        return None, ""

    @functools.cached_property
    def _patterns(self) -> list[tuple[re.Pattern, Rule]]:
        return [(re.compile(re.escape(rule.original).replace(r"\{\}", r"(\d+)")), rule) for rule in self.rules]


def _swapped(tensor: Tensor) -> Tensor:
    half = tensor.shape[0] // 2
    return concatenated([rows(tensor, half, tensor.shape[0]), rows(tensor, 0, half)])
