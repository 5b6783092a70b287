"""The command `offsetjax`: one command, sub-commands; a user's mistake is one line and exit status 2.

Nothing large is imported at the top: signals are heard from the first lines of the program on.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from offsetjax import log
from offsetjax.commands import data, models, others, training
from offsetjax.commands.explain import explain
from offsetjax.commands.shared import DEBUG, Command
from offsetjax.errors import Status
from offsetjax.parallel import signals


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one sub-command and returns the exit status, one of `errors.Status`.

    Without arguments this is the program itself: its signals are heard until Python has ended.
    """
    is_program = arguments is None
    if is_program:
        log.guard_streams()
    with signals.heard(signals.listener(signals.end), to_the_end=is_program):
        status = _run(list(sys.argv[1:] if arguments is None else arguments), is_program)
        if is_program:
            signals.pause(status)
    log.close_output()
    return status


def _run(arguments: Sequence[str], is_program: bool) -> int:
    logging.basicConfig(level=logging.WARNING, handlers=[log.Handler()])
    logging.getLogger("offsetjax").setLevel(logging.INFO)
    logging.captureWarnings(is_program)  # what Python writes to a reader that has stopped would wait for it
    options, rest = _parser().parse_known_args(arguments)
    try:
        _check_paths(options)
        if options.is_together:  # these have listeners of their own
            log.never_wait()
            options.run(options, rest)
        else:
            with signals.raised():  # what is half written is cleared away
                options.run(options, rest)
    except (Exception, KeyboardInterrupt) as error:
        return explain(error, options)
    return Status.DONE


def _parser() -> argparse.ArgumentParser:
    # Abbreviations would let --config.x and --config collide.
    description = "Trains latent diffusion models, and prepares, samples, compares and exports what it trains."
    parser = argparse.ArgumentParser(prog="offsetjax", description=description, allow_abbrev=False, parents=[DEBUG])
    parser.set_defaults(resumes="", is_together=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Command | None, help: str) -> argparse.ArgumentParser:
        about = f"{help[0].upper()}{help[1:]}."
        sub = commands.add_parser(name, help=help, description=about, allow_abbrev=False, parents=[DEBUG])
        sub.set_defaults(run=run)
        return sub

    for add in (
        *(training.add_train, training.add_plan, training.add_sweep, training.add_calibrate),
        *(models.add_sample, models.add_export, data.add_data, models.add_checkpoint, models.add_report),
        *(others.add_config, others.add_demo, others.add_study, data.add_pictures),
    ):
        add(command)
    return parser


def _check_paths(options: argparse.Namespace) -> None:
    """Every path that is given, before any work."""
    from offsetjax.files import check_place

    for name in ("config", "workdir", "model", "lora", "compare", "images", "data", "out", "cache_dir"):
        value = getattr(options, name, None)
        for path in value if isinstance(value, list) else [value]:
            if path is not None and not (name == "lora" and not path):
                check_place(f"--{name}", path)
