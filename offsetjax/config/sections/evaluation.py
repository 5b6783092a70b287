"""What is looked at during a training: pictures, validation losses, the spread of brightness."""

from offsetjax.config.field import Change, Field, Integers, Numbers, Section, Texts
from offsetjax.config.ranges import (
    ANY,
    DISTINCT_TIMESTEPS,
    FINITE_NUMBERS,
    FRACTION,
    SIZE,
    at_least,
    at_most_letters,
    count,
    one_of,
)
from offsetjax.diffusion.sampler import NAMES

_PROMPTS = at_most_letters(4096, each=10_000)

SAMPLE = Section(
    "sample",
    "How pictures are drawn, during training and by `offsetjax sample`.",
    (
        Field(
            "every_steps",
            int,
            500,
            count(0),
            "between the pictures of a training; 0: none are drawn",
            "steps",
            elsewhere={"sample_every_n_steps": "kohya", "validation_steps": "diffusers, SimpleTuner"},
            change=Change.FREELY,
        ),
        Field(
            "prompts",
            Texts,
            (),
            _PROMPTS,
            "what is drawn",
            elsewhere={"sample_prompts": "kohya", "validation_prompts": "diffusers", "validation_prompt": "diffusers"},
        ),
        Field(
            "size",
            str,
            "",
            SIZE,
            "of the pictures, width and height such as 1152x896; '': squares of data.resolution",
            "pixels",
        ),
        Field("negative_prompt", str, "", ANY, "what guidance leads away from"),
        Field("seeds_per_prompt", int, 4, count(1, 65_536), "pictures of each prompt"),
        Field("num_steps", int, 50, count(1), "steps of the sampler", elsewhere={"num_inference_steps": "diffusers"}),
        Field(
            "sampler",
            str,
            "ddim",
            one_of(*NAMES),
            "the rule by which a step follows the one before",
            elsewhere={"sample_sampler": "kohya", "noise_scheduler": "OneTrainer"},
        ),
        Field("shift", float, 0.0, at_least(0), "of a flow's sampler; 0: the schedule's"),
        Field("guidance_scale", float, 7.5, at_least(0), "of the prompt; 1: none, the prompt is followed as learnt"),
        Field(
            "guidance_rescale",
            float,
            0.0,
            FRACTION,
            "how much of the contrast that guidance adds is undone",
            elsewhere={"guidance_rescale": "diffusers", "validation_guidance_rescale": "SimpleTuner"},
        ),
        Field(
            "spacing",
            str,
            "trailing",
            one_of("trailing", "leading"),
            "which timesteps are visited: from the last one on, or from the first",
            elsewhere={"timestep_spacing": "diffusers"},
        ),
        Field(
            "start_noise",
            str,
            "matched",
            one_of("matched", "plain"),
            "the noise that drawing starts from: the training's, or independent pixels, as other programs do",
        ),
        Field(
            "brightness",
            Numbers,
            (),
            FINITE_NUMBERS,
            "of the start, a picture each, from dark (-2) to bright (2); none: drawn at random",
            "standard deviations",
        ),
        Field("params", str, "ema", one_of("ema", "raw"), "the averaged weights, or those of the last step"),
    ),
    change=Change.RESUME,
)

VALIDATION = Section(
    "validation",
    "The loss on pictures that are not trained on.",
    (
        Field("every_steps", int, 0, count(0), "between two validations; 0: none", "steps", change=Change.FREELY),
        Field("split", str, "", ANY, "of data.path, such as train[95%:] beside data.split = train[:95%]"),
        Field("num_examples", int, 64, count(1), "pictures"),
        Field("timesteps", Integers, (100, 300, 500, 700, 900, 999), DISTINCT_TIMESTEPS, "a loss for each"),
    ),
    change=Change.RESUME,
)

PROBE = Section(
    "probe",
    "The spread of brightness of pictures drawn from the weights of the step.",
    (
        Field("every_steps", int, 0, count(0), "between two probes; 0: none", "steps", change=Change.FREELY),
        Field("prompts", Texts, ("",), _PROMPTS, "what is drawn; the empty one: no prompt"),
        Field("seeds_per_prompt", int, 32, count(1, 65_536), "pictures of each prompt"),
    ),
    change=Change.RESUME,
)
