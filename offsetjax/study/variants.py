"""What is trained, and how it is sampled."""

from pathlib import Path
from typing import Any

# What each training changes in the config.
TRAININGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "offset": {"noise.offset_strength": 0.1},
    "pyramid": {"noise.kind": "pyramid", "noise.pyramid_discount": 0.8, "noise.pyramid_levels": 6},
    "adjusted": {"noise.kind": "adjusted", "noise.offset_strength": 0.1},
    "zero terminal SNR": {"schedule.zero_terminal_snr": True},
}
# A variant: which training, and the noise that its sampling starts from.
VARIANTS: dict[str, tuple[str, str]] = {
    "plain": ("plain", "plain"),
    "offset, plain start": ("offset", "plain"),
    "offset, matched": ("offset", "matched"),
    "pyramid, matched": ("pyramid", "matched"),
    "adjusted, matched": ("adjusted", "matched"),
    "zero terminal SNR": ("zero terminal SNR", "matched"),
}


def drawn(out: Path, name: str, seed: int, start: str, has_prompts: bool) -> Path:
    """Where the pictures of a run are."""
    return out / "drawn" / f"{name} {seed} {start} {'prompts' if has_prompts else 'unconditional'}"
