"""The figures of a report, computed from the work directories: what report.json holds.

Standard deviations are those of the values at hand (divided by their count), over the seeds of a prompt or the
pictures of the data.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from offsetjax.report.read import Data, Run, Samples
from offsetjax.report.section import Section

Numbers = dict[str, Any]


def summarise(runs: Sequence[Run], sections: Sequence[Section] = ()) -> Numbers:
    """Everything that the page and the conclusions say in figures, in JSON's types."""
    return {
        "runs": [_summarise_run(run) | {each.name: each.about(run) for each in sections} for run in runs],
        "config_differences": config_differences(runs),
        **{each.name: each.numbers for each in sections},
    }


def _summarise_run(run: Run) -> Numbers:
    last = run.metrics[-1] if run.metrics else {}
    sampled = [_summarise_samples(samples) for samples in run.steps]
    return {
        "name": run.name,
        "noise": noise_name(run.config),
        "offset_strength": float(run.config["noise.offset_strength"]),
        "steps": int(last.get("step", 0)),
        "steps_configured": run.config.get("train.steps"),
        "wall_clock_seconds": _finite(last.get("time_seconds")),
        "images_per_second": _median(run, "images_per_second"),
        "first_loss": _finite(run.metrics[0].get("loss")) if run.metrics else None,
        "last_loss": _last_loss(run),
        "last_loss_by_size": _last_losses_by_size(run),
        "stages": _summarise_stages(run),
        "steps_skipped": int(last.get("skipped", 0)),
        "not_finite": _not_finite(run),
        "seconds": {kind: round(value, 3) for kind, value in run.seconds.items()},
        "before": sampled[0] if sampled else None,
        "after": sampled[-1] if sampled else None,
        "samples": sampled,
        "unconditional": unconditional(run),
        "data": _summarise_data(run),
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
        "annealed": config.get("noise.anneal"),
    }
    words += [name for name, is_set in extras.items() if is_set]
    words = words or ["plain noise"]
    if config.get("schedule.process", "variance_preserving") != "variance_preserving":
        is_mapped = config.get("schedule.conversion") == "mapped"
        words.append(f"{'mapped ' if is_mapped else ''}{config['schedule.process']}")
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


def unconditional(run: Run) -> Numbers:
    """The spread of the pictures drawn for no prompt, by start noise: `{"plain": {...}, "matched": {...}}`.

    Those of `samples/unconditional_*.json` come before the ones in the last grid of the training.
    """
    others = sorted(run.others, key=lambda samples: (samples.name.startswith("unconditional"), samples.step))
    drawn = {samples.start_noise: samples for samples in run.steps[-1:] if "" in samples.prompts}
    drawn |= {samples.start_noise: samples for samples in others if "" in samples.prompts}
    return {start: {"step": samples.step, **spread(samples.brightness(""))} for start, samples in drawn.items()}


def _summarise_data(run: Run) -> Numbers:
    if not isinstance(run.data, Data):
        return {"unavailable": run.data}
    return {
        "pictures": run.data.size,
        "pictures_measured": len(run.data.brightness),
        "brightness": spread(run.data.brightness),
        "prompts": prompts_in_data(run),
    }


def prompts_in_data(run: Run) -> dict[str, Numbers]:
    """The spread of the training pictures with the caption of each sampled prompt that has any."""
    if not isinstance(run.data, Data):
        return {}
    by_caption: dict[str, list[float]] = {}
    for caption, value in zip(run.data.captions, run.data.brightness, strict=True):
        by_caption.setdefault(caption, []).append(value)
    prompts = {prompt for samples in run.steps for prompt in samples.prompts if prompt in by_caption}
    return {prompt: spread(by_caption[prompt]) for prompt in sorted(prompts)}


def config_differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The fields on which the runs disagree, with each run's value (null where it has none)."""
    fields = dict.fromkeys(field for run in runs for field in run.config)
    values = {field: [run.config.get(field) for run in runs] for field in fields}
    return {field: each for field, each in values.items() if any(value != each[0] for value in each)}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _not_finite(run: Run) -> dict[str, Numbers]:
    """The losses and norms that were logged as not finite: how often, and the first step at which."""
    found: dict[str, Numbers] = {}
    for line in [*run.metrics, *run.evaluations]:
        for name in (name for name, value in line.items() if not math.isfinite(value)):
            each = found.setdefault(name, {"first_step": int(line["step"]), "count": 0})
            each["count"] += 1
    return found


def _median(run: Run, name: str) -> float | None:
    # The first line includes the compilation.
    values = [line[name] for line in run.metrics[1:] or run.metrics if math.isfinite(line.get(name, math.nan))]
    return float(np.median(values)) if values else None


def _last_losses_by_size(run: Run) -> dict[str, float]:
    """The same of each size of pictures, where there are several."""
    fields = sorted({field for line in run.metrics for field in line if re.fullmatch(r"loss_\d{1,5}x\d{1,5}", field)})
    return {field.removeprefix("loss_"): loss for field in fields if (loss := _last_loss(run, field)) is not None}


def _summarise_stages(run: Run) -> list[Numbers]:
    """Each stage that has begun, with what is set for it and its last loss."""
    found = []
    for stage in run.stages:
        own = [line for line in run.metrics if stage.steps.start < line["step"] <= stage.steps.stop]
        about = {"stage": stage.number, "first_step": stage.steps.start + 1, "last_step": stage.steps.stop}
        if own:
            loss = _last_loss(replace(run, metrics=own))
            found.append({**about, "settings": dict(stage.settings), "last_loss": loss})
    return found


def _last_loss(run: Run, field: str = "") -> float | None:
    """The mean of the last tenth of the logged losses: a single step's loss says little.

    Of pictures of several sizes a logged step has one: it is the mean over all since the last line.
    """
    field = field or ("loss_of_sizes" if any("loss_of_sizes" in line for line in run.metrics) else "loss")
    losses = [line[field] for line in run.metrics if math.isfinite(line.get(field, math.nan))]
    return float(np.mean(losses[-max(1, len(losses) // 10) :])) if losses else None


def prompt_range(prompts: Mapping[str, Mapping[str, float]]) -> tuple[str, str, float] | None:
    """The darkest and the brightest prompt by mean, and how far apart they are; None for fewer than two.

    The empty prompt is left out: it names nothing that could be bright or dark.
    """
    named = [prompt for prompt in prompts if prompt]
    if len(named) < 2:
        return None
    darkest = min(named, key=lambda prompt: prompts[prompt]["mean"])
    brightest = max(named, key=lambda prompt: prompts[prompt]["mean"])
    return darkest, brightest, prompts[brightest]["mean"] - prompts[darkest]["mean"]
