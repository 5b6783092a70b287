"""`config`, which shows its fields; `demo` and `study`, which run experiments."""

import argparse
import sys
from collections.abc import Sequence

from offsetjax import log
from offsetjax.commands.shared import AddCommand, alone, no_more, overrides
from offsetjax.errors import UserError


def add_config(command: AddCommand) -> None:
    """Adds `config`."""
    sub = command("config", _config, "show the fields of a config: what they are, and what other trainers call them")
    sub.add_argument(
        "name", nargs="?", default="", help="a section, a field, or a setting of another trainer; all by default"
    )
    sub.add_argument("--config", help="a config file to check instead; what it sets is listed")
    sub.add_argument("--markdown", action="store_true", help="all of them as a page, offsetjax/config/REFERENCE.md")


def add_demo(command: AddCommand) -> None:
    """Adds `demo`."""
    sub = command("demo", _demo, "re-enact the article's experiment")
    sub.add_argument("--out", default="demo", help="a folder for its runs and its report")


def add_study(command: AddCommand) -> None:
    """Adds `study`."""
    sub = command("study", _study, "compare kinds of noise by trainings from scratch")
    sub.add_argument("--out", required=True, help="a folder for its runs, its table and its figures")
    sub.add_argument("--jobs", type=int, default=2, help="trainings at a time, a core each; default: %(default)s")
    sub.add_argument("--seeds", type=int, default=3, help="of each training; default: %(default)s")


def _config(options: argparse.Namespace, rest: Sequence[str]) -> None:
    if options.config:
        from offsetjax.config import flatten, is_explicit, load_config

        config = load_config(options.config, overrides(rest))
        log.show(*(f"{path} = {value!r}" for path, value in flatten(config) if is_explicit(config, path)))
        return
    no_more(rest)
    from rich.console import Console

    from offsetjax.config import reference
    from offsetjax.config.schema import sections

    if options.markdown:
        if options.name:
            raise UserError("config: --markdown is of all fields; leave the name out")
        sys.stdout.write(reference.page(sections()))
    else:
        reference.show(options.name, Console(highlight=False))


def _demo(options: argparse.Namespace, rest: Sequence[str]) -> None:
    no_more(rest)
    alone("demo")
    from etils import epath

    from offsetjax.article.demo import demo

    demo(epath.Path(options.out))


def _study(options: argparse.Namespace, rest: Sequence[str]) -> None:
    no_more(rest)
    alone("study")
    from offsetjax.study.command import study

    study(options.out, options.jobs, options.seeds)
