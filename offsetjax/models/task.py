"""What a task is: everything in which one kind of training differs from another, in one object.

A task says which parts of a family's model it takes and trains, and what it minimises. All else in the package asks a
`Task`, and never for a name; `TASKS.register(name, task)` makes another known.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from offsetjax.config.registries import TASKS
from offsetjax.models.family import Family

FORMATS = ("diffusers", "single_file", "lora", "comfyui_node")

Values = Mapping[str, Any]  # of a config, by path


@dataclass(frozen=True)
class Task:
    """One kind of training.

    A config is checked without any network: a task imports what it needs where it needs it.

    Attributes:
        name: the word in `task`.
        title: of what it trains, for people.
        parts: (family) → the parts with weights that it needs.
        trained: (family, whether text encoders learn) → those of them that it trains, whole or by their adapters.
        denoises: whether it noises latents and has them denoised, as captions tell: it has a schedule, a noise and
            tokenizers then, and a model that draws from prompts.
        objective: (pipeline, config) → what it minimises, a `training.objective.Objective`.
        evaluators: (run, source) → what is evaluated now and then, `training.evaluators.Evaluator`s.
        advice: (pipeline, config) → what a user should know of what these settings will give.
        formats: that what it trains can be exported in.
        rules: (values) → as `config.rules` has them: settings that it does not read, and why.
    """

    name: str
    title: str
    parts: Callable[[Family], tuple[str, ...]]
    trained: Callable[[Family, bool], tuple[str, ...]]
    denoises: bool
    objective: Callable[[Any, ConfigDict], Any]
    evaluators: Callable[[Any, Any], Sequence[Any]] = lambda run, source: ()
    advice: Callable[[Any, ConfigDict], Sequence[str]] = lambda pipeline, config: ()
    formats: tuple[str, ...] = FORMATS
    rules: Callable[[Values], Iterator[tuple[object, str]]] = lambda values: iter(())


def task_of(config: ConfigDict) -> Task:
    """The task of a config.

    Raises:
        UserError: there is none of its name.
    """
    return TASKS[config.task]
