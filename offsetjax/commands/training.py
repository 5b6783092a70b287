"""`train`, and what comes before one: `plan`, `sweep` and `calibrate`."""

import argparse
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from offsetjax import log
from offsetjax.commands.explain import explain
from offsetjax.commands.shared import OVERRIDES, AddCommand, add_stage, overrides
from offsetjax.errors import StorageError, UserError


def add_train(command: AddCommand) -> None:
    """Adds `train`."""
    sub = command("train", _train, "train, or resume, what a config file describes")
    sub.add_argument("--config", required=True, help="a config file, such as configs/stamps.py")
    sub.add_argument("--workdir", required=True, help="where the run lives: a folder or gs://…")
    sub.add_argument("--check", action="store_true", help="check everything and say what would happen; train nothing")
    sub.epilog = OVERRIDES
    sub.set_defaults(resumes="from the last checkpoint", is_together=True)


def add_plan(command: AddCommand) -> None:
    """Adds `plan`."""
    sub = command("plan", _plan, "say what a training needs of TPUs, and how fast it may be, without having any")
    sub.add_argument("--config", required=True, help="the config file of the training to be; no weights or data needed")
    sub.add_argument(
        "--topology",
        action="append",
        required=True,
        help="such as v5e:4x4, or cpu:8 for virtual devices of this machine; may be given several times",
    )
    sub.add_argument("--num_slices", type=int, default=1, help="of that topology; default: %(default)s")
    sub.add_argument("--full", action="store_true", help="generate code too, for the compiler's own estimate: slow")
    sub.add_argument("--search", action="store_true", help="look for the largest batch that fits, by more compilations")
    sub.add_argument("--cache_dir", help="where what is compiled is kept; by default ~/.cache/offsetjax/plan")
    sub.add_argument("--out", help="FILE.json")
    sub.epilog = OVERRIDES


def add_sweep(command: AddCommand) -> None:
    """Adds `sweep`."""
    sub = command("sweep", _sweep, "list the trainings of a sweep, which launch/sweep.sh runs")
    sub.add_argument("--config", required=True, help="a sweep file, such as configs/sweeps/article_strength.py")
    sub.add_argument("--workdir", required=True, help="where its runs live: a folder or gs://…")
    sub.epilog = (
        "A line a training: its state (new, step N of M, done), its name and the arguments of offsetjax that train it, "
        f"with tabs between them. {OVERRIDES}, for all of them."
    )


def add_calibrate(command: AddCommand) -> None:
    """Adds `calibrate`."""
    sub = command("calibrate", _calibrate, "measure the data's latents, and recommend a noise for them")
    sub.add_argument("--config", required=True, help="the config file of the training to be")
    sub.add_argument("--out", required=True, help="FILE.json, for noise.calibration; its figures are put beside it")
    sub.add_argument(
        "--target_snr",
        type=float,
        default=0.1,
        help="what may be left of a picture's mean at the last step; %(default)s",
    )
    add_stage(sub)
    sub.epilog = OVERRIDES
    sub.set_defaults(is_together=True)


def _train(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from offsetjax.parallel import processes

    with processes.together(partial(explain, options=options)):
        from offsetjax.config import Origin, digest, load_config

        config = load_config(options.config, overrides(rest))
        logging.getLogger("offsetjax").info("%s, sha256 %s", options.config, digest(options.config)[:16])
        if options.check:
            _show_check(config, options.workdir)
            return
        from offsetjax.train import train

        train(config, options.workdir, Origin(options.config, overrides(rest)))


def _show_check(config: Any, workdir: str) -> None:
    from offsetjax.parallel.fallback import warn_of_cpu
    from offsetjax.training.check import check

    warn_of_cpu()
    wrong, notes, lines = check(config, workdir)
    for note in notes:
        log.show(f"note: {note}")
    if wrong:
        for mistake in wrong[:-1]:
            log.say(f"error: {mistake}")
        raise UserError(wrong[-1])
    log.show(*lines, "nothing is wrong; nothing was written")


def _plan(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from offsetjax.config import load_config

    config = load_config(options.config, overrides(rest))
    from offsetjax.plan.command import plan

    plan(
        config,
        options.topology,
        num_slices=options.num_slices,
        is_full=options.full,
        searches=options.search,
        out=options.out,
        cache_dir=options.cache_dir,
    )


def _sweep(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from offsetjax.prepare.sweep import listing

    log.show(*listing(options.config, options.workdir, overrides(rest)), is_exact=True)
    if log.has_lost_output():
        raise StorageError("sweep: its list cannot be written to standard output; see where that goes")


def _calibrate(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from offsetjax.parallel import processes

    with processes.together(partial(explain, options=options)):
        from offsetjax.config import config_of_stage, load_config

        config = config_of_stage(load_config(options.config, overrides(rest)), options.stage)
        from offsetjax.prepare.calibrate import calibrate

        calibrate(config, options.out, options.target_snr)
