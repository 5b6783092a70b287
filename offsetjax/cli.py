"""The command `offsetjax`: one command, sub-commands; a user's mistake is one line and exit status 2.

Nothing large is imported at the top: signals are heard from the first lines of the program on.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from offsetjax import log
from offsetjax.errors import PreemptedError, Status, StorageError, TransientError, UserError, kind_of, one_line
from offsetjax.parallel import signals

Command = Callable[[argparse.Namespace, Sequence[str]], None]

_TEXT_LINES = "of a text file with several lines: they are one caption, the first is it, or each is one"
_OVERRIDES = "--config.path=value changes one field of the config, such as --config.noise.offset_strength=0.1"
_REMEDIES = {
    Status.MISTAKE: "see to it and try again",
    Status.STORAGE: "see to the storage, then the same command tries again",
    Status.TRANSIENT: "it may pass by itself: the same command tries again",
}


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
        if options.run in _TOGETHER:  # these have listeners of their own
            log.never_wait()
            options.run(options, rest)
        else:
            with signals.raised():  # what is half written is cleared away
                options.run(options, rest)
    except (Exception, KeyboardInterrupt) as error:
        return _explain(error, options)
    return Status.DONE


def _explain(error: BaseException, options: argparse.Namespace | None = None) -> int:
    """Reports an error to the user, and returns the exit status.

    Args:
        options: of the command line.
    """
    from offsetjax import faults

    options = options or argparse.Namespace()
    status, resumes = kind_of(error), _RESUMES.get(getattr(options, "run", _train), "")
    match error:
        case UserError() | StorageError() | TransientError():
            text = f"error: {error}"
        case PreemptedError():
            text = f"ended by {signals.name(error.number)} {error}; the same command resumes from there"
        case signals.Interrupted() if status == Status.PREEMPTED:
            text = f"ended by {signals.name(error.number)}"
        case KeyboardInterrupt():
            text = "interrupted" + (f"; the same command resumes {resumes}" if resumes else "")
        case OSError() if status in _REMEDIES:
            what = f"{error.filename}: {error.strerror}" if error.filename else one_line(error)
            text = f"error: {what}; {_REMEDIES[status]}"
        case _ if status in _REMEDIES:
            text = f"error: {type(error).__name__}: {one_line(error)}; {_REMEDIES[status]}"
        case _:
            text = f"error: a fault of offsetjax: {type(error).__name__}: {one_line(error)}"
    # A number of the system's says enough; where else an error came from, only the stack trace does.
    is_expected = isinstance(error, UserError | StorageError | TransientError | PreemptedError | KeyboardInterrupt)
    is_expected |= isinstance(error, OSError) and not isinstance(error, ConnectionError) and status != Status.FAULT
    if getattr(options, "debug", False) or not is_expected:
        log.write(faults.trace(error))
    if status == Status.FAULT and (report := faults.write_report(error, sys.argv[1:], _folder(options))):
        text += f"; all that a report needs is in {report}"
    log.say(text)
    return status


def _folder(options: argparse.Namespace) -> str:
    """Of the run that a command works on; "" where it is none."""
    workdir = getattr(options, "workdir", "")
    return workdir if isinstance(workdir, str) else ""


def _parser() -> argparse.ArgumentParser:
    # Abbreviations would let --config.x and --config collide.
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="print the stack trace of any error"
    )
    description = "Trains latent diffusion models, and prepares, samples, compares and exports what it trains."
    parser = argparse.ArgumentParser(prog="offsetjax", description=description, allow_abbrev=False, parents=[debug])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Command | None, help: str) -> argparse.ArgumentParser:
        about = f"{help[0].upper()}{help[1:]}."
        sub = commands.add_parser(name, help=help, description=about, allow_abbrev=False, parents=[debug])
        sub.set_defaults(run=run)
        return sub

    sub = command("train", _train, "train, or resume, what a config file describes")
    sub.add_argument("--config", required=True, help="a config file, such as configs/stamps.py")
    sub.add_argument("--workdir", required=True, help="where the run lives: a folder or gs://…")
    sub.add_argument("--check", action="store_true", help="check everything and say what would happen; train nothing")
    sub.epilog = _OVERRIDES

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
    sub.epilog = _OVERRIDES

    sub = command("sweep", _sweep, "list the trainings of a sweep, which launch/sweep.sh runs")
    sub.add_argument("--config", required=True, help="a sweep file, such as configs/sweeps/article_strength.py")
    sub.add_argument("--workdir", required=True, help="where its runs live: a folder or gs://…")
    sub.epilog = (
        "A line a training: its state (new, step N of M, done), its name and the arguments of offsetjax that train it, "
        f"with tabs between them. {_OVERRIDES}, for all of them."
    )

    sub = command("calibrate", _calibrate, "measure the data's latents, and recommend a noise for them")
    sub.add_argument("--config", required=True, help="the config file of the training to be")
    sub.add_argument("--out", required=True, help="FILE.json, for noise.calibration; FILE.png is put beside it")
    sub.add_argument(
        "--target_snr",
        type=float,
        default=0.1,
        help="what may be left of a picture's mean at the last step; %(default)s",
    )
    sub.epilog = _OVERRIDES

    sub = command("sample", _sample, "draw pictures with a training's model, or any other")
    which = sub.add_mutually_exclusive_group(required=True)
    which.add_argument("--workdir", help="of a training")
    which.add_argument("--model", help="a diffusers directory or a single file: exported, or never trained here")
    _checkpoint_arguments(sub)
    sub.add_argument("--lora", default="", help="a LoRA file to draw with, for --model")
    sub.add_argument("--variant", default="", help="of the weights of --model, such as fp16")
    sub.add_argument(
        "--compare",
        metavar="MODEL",
        help="a work directory, a diffusers directory or a single file to draw with too, from the same seeds: "
        "compare.png has its pictures on the left, those of --workdir or --model on the right",
    )
    sub.add_argument("--prompt", action="append", required=True, help="may be given several times")
    sub.add_argument("--seed", action="append", type=int, help="may be given several times; default: 0")
    sub.add_argument(
        "--start_noise",
        type=_choice("sample.start_noise"),
        help="start from the noise of training, matched, or from plain noise as other programs do",
    )
    sub.add_argument("--sampler", type=_choice("sample.sampler"), help="see `offsetjax config sample.sampler`")
    sub.add_argument("--guidance_scale", type=float, help="of the prompt; 1: none, the prompt is followed as learnt")
    sub.add_argument(
        "--guidance_rescale", type=float, help="how much of the contrast that guidance adds is undone, 0 to 1"
    )
    sub.add_argument("--num_steps", type=int, help="of the sampler")
    sub.add_argument(
        "--brightness",
        action="append",
        type=float,
        help="of the start, in standard deviations, from dark (-2) to bright (2); may be given several times",
    )
    sub.add_argument("--out", required=True, help="a folder for the pictures")
    sub.epilog = (
        "How to draw, where it is not given, is in the config's section sample; of a --model the defaults are taken, "
        "and its noise and size are read from its file."
    )

    sub = command("export", _export, "write a model that PyTorch programs load")
    sub.add_argument("--workdir", required=True, help="of a training")
    _checkpoint_arguments(sub)
    sub.add_argument(
        "--format",
        choices=("diffusers", "single_file", "lora", "comfyui_node"),
        default="diffusers",
        help="a directory; one file in the original layout; the adapters of a LoRA training; ComfyUI nodes that draw "
        "the training's noise. Default: %(default)s",
    )
    sub.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the weights; default: %(default)s",
    )
    sub.add_argument("--lora_keys", choices=("kohya", "diffusers"), help="of --format=lora; kohya by default")
    sub.add_argument("--max_shard_gb", type=float, help="split a directory's weights beyond this; 10 by default")
    sub.add_argument(
        "--out", required=True, help="a folder, FILE.safetensors, or FILE.py of nodes, that does not exist yet"
    )

    sub = command("data", None, "build, encode or inspect a data set")
    data = sub.add_subparsers(required=True, metavar="build|encode|inspect")
    common: dict[str, Any] = {"allow_abbrev": False, "parents": [debug]}
    sub = data.add_parser("build", help="a folder of captioned images → ArrayRecord", **common)
    sub.set_defaults(run=_data_build)
    sub.add_argument("--images", required=True, help="pictures with metadata.jsonl, or name.txt beside name.png")
    sub.add_argument("--out", required=True)
    sub.add_argument("--max_dropped", type=float, default=0.1, help="the share of broken pictures that is accepted")
    sub.add_argument("--text_lines", choices=("whole", "first", "each"), default="whole", help=_TEXT_LINES)
    sub.add_argument("--no_repeats", action="store_true", help="folders called `10_a cat` are not kohya's")
    sub.add_argument("--follow_links", action="store_true", help="links may lead out of the folder")
    sub.add_argument("--workers", type=int, default=0, help="processes; by default as many as there are cores")
    sub = data.add_parser("encode", help="the latents of a data set, to train from", **common)
    sub.set_defaults(run=_data_encode)
    sub.add_argument("--config", required=True, help="the config file of the training to be")
    sub.add_argument("--out", required=True, help="a folder for data.path, with data.cached_latents=True, or gs://…")
    sub.epilog = f"What was interrupted is resumed with the parts that are missing. {_OVERRIDES}"
    sub = data.add_parser("inspect", help="what a data set holds", **common)
    sub.set_defaults(run=_data_inspect)
    sub.add_argument("--data", required=True)
    sub.add_argument("--split", default="train", help="of the data set, such as test or train[:10%%]; %(default)s")
    sub.add_argument("--out", help="a PNG for the contact sheet")

    sub = command("checkpoint", None, "list, verify or prune what a training has saved")
    kinds = sub.add_subparsers(required=True, metavar="list|verify|prune")
    for name, help in (
        ("list", "the steps and their sizes"),
        ("verify", "read every array, and compare it with its checksum"),
        ("prune", "delete all but the newest steps, once these are verified"),
    ):
        sub = kinds.add_parser(name, help=help, **common)
        sub.set_defaults(run=_CHECKPOINT[name])
        sub.add_argument("--workdir", required=True, help="of a training")
        if name == "verify":
            sub.add_argument("--step", type=int, help="only this one")
        if name == "prune":
            sub.add_argument("--keep", type=int, required=True, help="how many steps stay")

    sub = command("report", _report, "compare runs on one HTML page")
    sub.add_argument(
        "--workdir", action="append", required=True, help="of a training or of a sweep; may be given several times"
    )
    sub.add_argument("--out", required=True, help="FILE.html")

    sub = command("config", _config, "show the fields of a config: what they are, and what other trainers call them")
    sub.add_argument(
        "name", nargs="?", default="", help="a section, a field, or a setting of another trainer; all by default"
    )
    sub.add_argument("--config", help="a config file to check instead; what it sets is listed")
    sub.add_argument("--markdown", action="store_true", help="all of them as a page, offsetjax/config/REFERENCE.md")

    sub = command("demo", _demo, "re-enact the article's experiment")
    sub.add_argument("--out", default="demo", help="a folder for its runs and its report")

    sub = command("study", _study, "compare kinds of noise by trainings from scratch")
    sub.add_argument("--out", required=True, help="a folder for its runs, its table and its figures")
    sub.add_argument("--jobs", type=int, default=2, help="trainings at a time, a core each; default: %(default)s")
    sub.add_argument("--seeds", type=int, default=3, help="of each training; default: %(default)s")

    sub = command("pictures", None, "write captioned pictures to try the rest with")
    kinds = sub.add_subparsers(required=True, metavar="article|forty|stamps")
    for name, help in (
        ("article", "procedural scenes of any brightness, that the base model of the demonstration is pretrained on"),
        ("forty", "40 of these, whose captions decide on their brightness, that the demonstration fine-tunes on"),
        ("stamps", "real ones: Tux Paint's stamps, each on four grounds"),
    ):
        sub = kinds.add_parser(name, help=help, allow_abbrev=False)
        sub.set_defaults(run=_pictures, kind=name)
        sub.add_argument("--out", required=True, help="a folder that does not exist yet, for data build")
        if name == "article":
            sub.add_argument("--count", type=int, default=2048, help="default: %(default)s")
        if name != "stamps":
            sub.add_argument("--seed", type=int, default=1 if name == "forty" else 0, help="default: %(default)s")
        else:
            sub.add_argument("--stamps", help="a folder of stamps; by default those of tuxpaint-stamps-default")
            sub.add_argument("--size", type=int, default=128, help="the side of a picture, in pixels; %(default)s")
    return parser


def _choice(path: str) -> Callable[[str], str]:
    """The type of an option that takes what a field of the config does; the fields are read once it is given."""

    def check(text: str) -> str:
        from offsetjax.config.schema import choices

        if text not in choices(path):
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(choices(path))}")
        return text

    return check


def _checkpoint_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--step", type=int, help="the newest by default")
    sub.add_argument(
        "--params", type=_choice("sample.params"), help="averaged or not; by default the config's sample.params"
    )


def _check_paths(options: argparse.Namespace) -> None:
    """Every path that is given, before any work."""
    from offsetjax.files import check_place

    for name in ("config", "workdir", "model", "lora", "compare", "images", "data", "out", "cache_dir"):
        value = getattr(options, name, None)
        for path in value if isinstance(value, list) else [value]:
            if path is not None and not (name == "lora" and not path):
                check_place(f"--{name}", path)


def _no_more(rest: Sequence[str]) -> None:
    if rest:
        raise UserError(f"unknown argument {rest[0]}; see --help")


def _alone(command: str) -> None:
    """Refuses what one process does, in one of several: on a pod it would wait for the others for ever."""
    hosts = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(","))
    if (count := os.environ.get("JAX_NUM_PROCESSES", str(hosts))) != "1":
        raise UserError(
            f"{command}: works in one process, but this is one of {count}; run it on a machine of its own, or here "
            "with JAX_PLATFORMS=cpu JAX_NUM_PROCESSES=1"
        )


def _overrides(rest: Sequence[str]) -> list[tuple[str, str]]:
    """The fields that `--config.path=value` changes, with their values as text."""
    overrides = []
    for argument in rest:
        key, equals, text = argument.partition("=")
        if not key.startswith("--config.") or not equals:
            raise UserError(f"unknown argument {argument}; fields are given as --config.path=value")
        overrides.append((key.removeprefix("--config."), text))
    return overrides


def _train(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from offsetjax.parallel import processes

    with processes.together(partial(_explain, options=options)):
        from offsetjax.config import Origin, digest, load_config

        config = load_config(options.config, _overrides(rest))
        logging.getLogger("offsetjax").info("%s, sha256 %s", options.config, digest(options.config)[:16])
        if options.check:
            _show_check(config, options.workdir)
            return
        from offsetjax.train import train

        train(config, options.workdir, Origin(options.config, _overrides(rest)))


def _show_check(config: Any, workdir: str) -> None:
    from offsetjax.parallel.fallback import warn_of_cpu
    from offsetjax.training.check import check

    warn_of_cpu()
    wrong, notes, lines = check(config, workdir)
    for note in notes:
        print(f"note: {note}")
    if wrong:
        for mistake in wrong[:-1]:
            log.say(f"offsetjax: error: {mistake}")
        raise UserError(wrong[-1])
    print("\n".join([*lines, "nothing is wrong; nothing was written"]))


def _plan(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from offsetjax.config import load_config

    config = load_config(options.config, _overrides(rest))
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

    print("\n".join(listing(options.config, options.workdir, _overrides(rest))), flush=True)
    if log.has_lost_output():
        raise StorageError("sweep: its list cannot be written to standard output; see where that goes")


def _calibrate(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from offsetjax.parallel import processes

    with processes.together(partial(_explain, options=options)):
        from offsetjax.config import load_config

        config = load_config(options.config, _overrides(rest))
        from offsetjax.prepare.calibrate import calibrate

        calibrate(config, options.out, options.target_snr)


def _sample(options: argparse.Namespace, rest: Sequence[str]) -> None:
    _no_more(rest)
    _alone("sample")
    for name in ("step", "params") if options.model else ("lora", "variant"):
        if getattr(options, name) not in (None, ""):
            raise UserError(f"sample: --{name} cannot apply to --{'model' if options.model else 'workdir'}")
    from offsetjax.models.pretrained import check_model, load_model
    from offsetjax.models.workdir import Trained, load_trained
    from offsetjax.sampling.sample import compare, sample

    settings = {
        key: getattr(options, key)
        for key in ("start_noise", "sampler", "guidance_scale", "guidance_rescale", "num_steps")
        if getattr(options, key) is not None
    }
    if options.brightness:
        settings["brightness"] = tuple(options.brightness)

    def load() -> Trained:
        if options.model:
            return load_model(options.model, variant=options.variant, lora=options.lora)
        return load_trained(options.workdir, options.step, options.params)

    seeds = options.seed or [0]
    if options.compare:
        check_model(options.compare)  # the other model is drawn with first
        compare(lambda: load_model(options.compare), load, options.out, options.prompt, seeds, **settings)
    else:
        sample(load(), options.out, options.prompt, seeds, **settings)


def _export(options: argparse.Namespace, rest: Sequence[str]) -> None:
    _no_more(rest)
    _alone("export")
    from offsetjax.exporting.export import export

    export(
        options.workdir,
        options.out,
        form=options.format,
        step=options.step,
        params=options.params,
        dtype=options.dtype,
        lora_keys=options.lora_keys,
        max_shard_gb=options.max_shard_gb,
    )


def _data_build(options: argparse.Namespace, rest: Sequence[str]) -> None:
    _no_more(rest)
    from offsetjax.data.build import build

    build(
        options.images,
        options.out,
        options.max_dropped,
        workers=options.workers,
        lines=options.text_lines,
        repeats=not options.no_repeats,
        follow_links=options.follow_links,
    )


def _data_encode(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from offsetjax.parallel import processes

    with processes.together(partial(_explain, options=options)):
        from offsetjax.config import load_config

        config = load_config(options.config, _overrides(rest))
        from offsetjax.prepare.latents import encode_data

        encode_data(config, options.out)


def _data_inspect(options: argparse.Namespace, rest: Sequence[str]) -> None:
    _no_more(rest)
    from offsetjax.data.inspect import inspect

    inspect(options.data, options.out, options.split)


def _checkpoint_list(options: argparse.Namespace, rest: Sequence[str]) -> None:
    _no_more(rest)
    from offsetjax.storage.command import list_steps

    list_steps(options.workdir)


def _checkpoint_verify(options: argparse.Namespace, rest: Sequence[str]) -> None:
    _no_more(rest)
    from offsetjax.storage.command import verify

    verify(options.workdir, options.step)


def _checkpoint_prune(options: argparse.Namespace, rest: Sequence[str]) -> None:
    _no_more(rest)
    from offsetjax.storage.command import prune

    prune(options.workdir, options.keep)


_CHECKPOINT = {"list": _checkpoint_list, "verify": _checkpoint_verify, "prune": _checkpoint_prune}


def _report(options: argparse.Namespace, rest: Sequence[str]) -> None:
    _no_more(rest)
    from offsetjax.report import report

    report(options.workdir, options.out)


def _config(options: argparse.Namespace, rest: Sequence[str]) -> None:
    if options.config:
        from offsetjax.config import flatten, is_explicit, load_config

        config = load_config(options.config, _overrides(rest))
        print("\n".join(f"{path} = {value!r}" for path, value in flatten(config) if is_explicit(config, path)))
        return
    _no_more(rest)
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
    _no_more(rest)
    _alone("demo")
    from etils import epath

    from offsetjax.article.demo import demo

    demo(epath.Path(options.out))


def _study(options: argparse.Namespace, rest: Sequence[str]) -> None:
    _no_more(rest)
    _alone("study")
    from offsetjax.study.command import study

    study(options.out, options.jobs, options.seeds)


def _pictures(options: argparse.Namespace, rest: Sequence[str]) -> None:
    _no_more(rest)
    if options.kind == "stamps":
        from offsetjax.prepare.stamps import INSTALLED, write_stamps

        write_stamps(options.out, options.stamps or INSTALLED, options.size)
        return
    from etils import epath

    from offsetjax.article import pictures

    if epath.Path(options.out).exists():
        raise UserError(f"pictures: --out={options.out} already exists; give another folder")
    if options.kind == "forty":
        pictures.write_fine_tuning_folder(options.out, options.seed)
    else:
        pictures.write_folder(options.out, options.count, options.seed)


_RESUMES: dict[Command, str] = {_train: "from the last checkpoint", _data_encode: "with the parts that are missing"}
_TOGETHER = (_train, _calibrate, _data_encode)
