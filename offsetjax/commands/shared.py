"""What the sub-commands share: how one is added, and what is refused before anything large is imported."""

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Protocol

from offsetjax.errors import UserError

Command = Callable[[argparse.Namespace, Sequence[str]], None]  # options, and the arguments that are none of them

OVERRIDES = "--config.path=value changes one field of the config, such as --config.noise.offset_strength=0.1"
DEBUG = argparse.ArgumentParser(add_help=False)
DEBUG.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="print the stack trace of any error")


class AddCommand(Protocol):
    """Adds a sub-command, and gives its parser.

    A command's defaults may say, beside `run`: `resumes`, from where the same command resumes, and
    `is_together`, that several processes run it as one and listen to signals themselves.
    """

    def __call__(self, name: str, run: Command | None, help: str) -> argparse.ArgumentParser: ...


def choice(path: str) -> Callable[[str], str]:
    """The type of an option that takes what a field of the config does; the fields are read once it is given."""

    def check(text: str) -> str:
        from offsetjax.config.schema import choices

        if text not in choices(path):
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(choices(path))}")
        return text

    return check


def add_stage(parser: argparse.ArgumentParser) -> None:
    """Adds `--stage`, to what is prepared for one of several stages."""
    parser.add_argument("--stage", type=int, help="of train.stages, by its number, where the config has several")


def no_more(rest: Sequence[str]) -> None:
    """Refuses arguments of a command that takes no other."""
    if rest:
        raise UserError(f"unknown argument {rest[0]}; see --help")


def alone(command: str) -> None:
    """Refuses what one process does, in one of several: on a pod it would wait for the others for ever."""
    hosts = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(","))
    if (count := os.environ.get("JAX_NUM_PROCESSES", str(hosts))) != "1":
        raise UserError(
            f"{command}: works in one process, but this is one of {count}; run it on a machine of its own, or here "
            "with JAX_PLATFORMS=cpu JAX_NUM_PROCESSES=1"
        )


def overrides(rest: Sequence[str]) -> list[tuple[str, str]]:
    """The fields that `--config.path=value` changes, with their values as text."""
    overrides = []
    for argument in rest:
        key, equals, text = argument.partition("=")
        if not key.startswith("--config.") or not equals:
            raise UserError(f"unknown argument {argument}; fields are given as --config.path=value")
        overrides.append((key.removeprefix("--config."), text))
    return overrides
