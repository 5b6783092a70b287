"""The figures of a report, computed from the work directories: what report.json holds.

Standard deviations are those of the values at hand (divided by their count), over the seeds of a prompt or the
pictures of the data.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from offsetjax.report import article
from offsetjax.report.read import Arm, Data, Samples

Numbers = dict[str, Any]


def summarise(arms: Sequence[Arm]) -> Numbers:
    """Everything that the page and the conclusions say in figures, in JSON's types."""
    return {
        "arms": [_summarise_arm(arm) for arm in arms],
        "config_differences": config_differences(arms),
        "article": {
            "source": article.SOURCE,
            "offset_strength": article.OFFSET_STRENGTH,
            "steps": article.STEPS,
            "brightness": {figure.key: {"before": figure.before, "after": figure.after} for figure in article.FIGURES},
        },
    }


def _summarise_arm(arm: Arm) -> Numbers:
    last = arm.metrics[-1] if arm.metrics else {}
    sampled = [_summarise_samples(samples) for samples in arm.steps]
    return {
        "name": arm.name,
        "noise": noise_name(arm.config),
        "offset_strength": float(arm.config["noise.offset_strength"]),
        "steps": int(last.get("step", 0)),
        "steps_configured": arm.config.get("train.steps"),
        "wall_clock_seconds": _finite(last.get("time_seconds")),
        "images_per_second": _median(arm, "images_per_second"),
        "first_loss": _finite(arm.metrics[0].get("loss")) if arm.metrics else None,
        "last_loss": _last_loss(arm),
        "steps_skipped": int(last.get("skipped", 0)),
        "before": sampled[0] if sampled else None,
        "after": sampled[-1] if sampled else None,
        "samples": sampled,
        "unconditional": unconditional(arm),
        "data": _summarise_data(arm),
    }


def noise_name(config: Mapping[str, Any]) -> str:
    """What a training's noise is, in a few words: `plain noise`, `offset_strength 0.1`, `pyramid`."""
    strength, channels = config["noise.offset_strength"], config.get("noise.channel_strengths") or ()
    kind = config.get("noise.kind", "offset")
    words = [] if kind == "offset" else [kind]
    if strength or channels:
        words.append(f"offset_strength {strength:g}" if strength else f"offset up to {max(channels):.2g}")
    extras = {
        "adaptive": config.get("noise.adaptive_scale"),
        "random": config.get("noise.random_strength"),
        "for some": config.get("noise.probability", 1.0) < 1,
        "input perturbation": config.get("noise.input_perturbation"),
    }
    words += [name for name, is_set in extras.items() if is_set]
    words = words or ["plain noise"]
    return ", ".join(words + (["zero terminal SNR"] if config.get("schedule.zero_terminal_snr") else []))


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """`[.2, .4] → {"mean": .3, "std": .1, "count": 2}`."""
    return {"mean": round(float(np.mean(values)), 5), "std": round(float(np.std(values)), 5), "count": len(values)}


def _summarise_samples(samples: Samples) -> Numbers:
    return {
        "step": samples.step,
        "params": samples.params,
        "start_noise": samples.start_noise,
        "guidance_scale": samples.guidance_scale,
        "num_steps": samples.num_steps,
        "prompts": {prompt: spread(samples.brightness(prompt)) for prompt in samples.prompts},
    }


def unconditional(arm: Arm) -> Numbers:
    """The spread of the pictures drawn for no prompt, by start noise: `{"plain": {...}, "matched": {...}}`.

    Those of `samples/unconditional_*.json` come before the ones in the last grid of the training.
    """
    others = sorted(arm.others, key=lambda samples: (samples.name.startswith("unconditional"), samples.step))
    drawn = {samples.start_noise: samples for samples in arm.steps[-1:] if "" in samples.prompts}
    drawn |= {samples.start_noise: samples for samples in others if "" in samples.prompts}
    return {start: {"step": samples.step, **spread(samples.brightness(""))} for start, samples in drawn.items()}


def _summarise_data(arm: Arm) -> Numbers:
    if not isinstance(arm.data, Data):
        return {"unavailable": arm.data}
    return {
        "pictures": arm.data.size,
        "pictures_measured": len(arm.data.brightness),
        "brightness": spread(arm.data.brightness),
        "prompts": prompts_in_data(arm),
        "has_black_picture": article.BLACK_PROMPT in arm.data.captions,
    }


def prompts_in_data(arm: Arm) -> dict[str, Numbers]:
    """The spread of the training pictures with the caption of each sampled prompt that has any."""
    if not isinstance(arm.data, Data):
        return {}
    by_caption: dict[str, list[float]] = {}
    for caption, value in zip(arm.data.captions, arm.data.brightness, strict=True):
        by_caption.setdefault(caption, []).append(value)
    prompts = {prompt for samples in arm.steps for prompt in samples.prompts if prompt in by_caption}
    return {prompt: spread(by_caption[prompt]) for prompt in sorted(prompts)}


def config_differences(arms: Sequence[Arm]) -> dict[str, list[Any]]:
    """The fields on which the arms disagree, with each arm's value (null where it has none)."""
    fields = dict.fromkeys(field for arm in arms for field in arm.config)
    values = {field: [arm.config.get(field) for arm in arms] for field in fields}
    return {field: each for field, each in values.items() if any(value != each[0] for value in each)}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _median(arm: Arm, name: str) -> float | None:
    # The first line includes the compilation.
    values = [line[name] for line in arm.metrics[1:] or arm.metrics if math.isfinite(line.get(name, math.nan))]
    return float(np.median(values)) if values else None


def _last_loss(arm: Arm) -> float | None:
    """The mean of the last tenth of the logged losses: a single step's loss says little."""
    losses = [line["loss"] for line in arm.metrics if math.isfinite(line.get("loss", math.nan))]
    return float(np.mean(losses[-max(1, len(losses) // 10) :])) if losses else None


def prompt_range(prompts: Mapping[str, Mapping[str, float]]) -> tuple[str, str, float] | None:
    """The darkest and the brightest prompt by mean, and how far apart they are; None for fewer than two.

    No prompt, and the black picture's, are left out: they name no brightness of a scene.
    """
    named = [prompt for prompt in prompts if prompt and prompt != article.BLACK_PROMPT]
    if len(named) < 2:
        return None
    darkest = min(named, key=lambda prompt: prompts[prompt]["mean"])
    brightest = max(named, key=lambda prompt: prompts[prompt]["mean"])
    return darkest, brightest, prompts[brightest]["mean"] - prompts[darkest]["mean"]
