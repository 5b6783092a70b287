"""The command `offsetjax`: one command, sub-commands; a user's mistake is one line and exit status 2."""

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

from etils import epath

from offsetjax.errors import PreemptedError, UserError, one_line

Command = Callable[[argparse.Namespace, Sequence[str]], None]

# A mistake of the user's, which no other try will mend.
_MISTAKES = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
)
_OVERRIDES = "--config.path=value changes one field of the config, such as --config.noise.offset_strength=0.1"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one sub-command and returns the exit status: 0; 2, a user's mistake; 130, Ctrl-C; 143, SIGTERM."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("offsetjax").setLevel(logging.INFO)
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    try:
        _check_paths(options)
        options.run(options, rest)
    except (Exception, KeyboardInterrupt) as error:
        return _explain(error, resumes=_RESUMES.get(options.run, ""))
    return 0


def _explain(error: BaseException, resumes: str = "") -> int:
    """Tells the user of an error, and returns the exit status; what is a fault of the program is raised again.

    Args:
        resumes: from where the same command does, if it does.
    """
    match error:
        case UserError():
            status, text = 2, f"error: {error}"
        # A bucket's errors have no number, and a name that is not resolved a negative one; what else says neither a
        # file nor a mistake may be a fault of the program. A disk or a network may do better the next time.
        case OSError() if error.filename or error.errno in _MISTAKES or (error.errno or -1) < 0:
            is_mistake = error.errno in _MISTAKES or isinstance(error, FileNotFoundError | PermissionError)
            what = f"{error.filename}: {error.strerror}" if error.filename else one_line(error)
            status, text = 2 if is_mistake else 1, f"error: {what}; see to it and try again"
        case PreemptedError():
            status, text = 143, f"ended by SIGTERM {error}; the same command resumes from there"
        case KeyboardInterrupt():
            status, text = 130, "interrupted" + (f"; the same command resumes {resumes}" if resumes else "")
        case _:
            raise error
    print(f"offsetjax: {text}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    # Abbreviations would let --config.x and --config collide.
    parser = argparse.ArgumentParser(prog="offsetjax", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Command | None, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    sub = command("train", _train, "train, or resume, what a config file describes")
    sub.add_argument("--config", required=True, help="a config file, such as configs/stamps.py")
    sub.add_argument("--workdir", required=True, help="where the run lives: a folder or gs://…")
    sub.epilog = _OVERRIDES

    sub = command("plan", _plan, "say what a training needs of TPUs, and how fast it may be, without having any")
    sub.add_argument("--config", required=True, help="the config file of the training to be; no weights or data needed")
    sub.add_argument(
        "--topology",
        action="append",
        required=True,
        help="such as v5e:4x4, or cpu:8 for virtual devices of this machine; may be given several times",
    )
    sub.add_argument("--num_slices", type=int, default=1, help="of that topology; %(default)s without it")
    sub.add_argument("--full", action="store_true", help="generate code too, for the compiler's own estimate: slow")
    sub.add_argument("--search", action="store_true", help="look for the largest batch that fits, by more compilations")
    sub.add_argument("--cache_dir", help="where what is compiled is kept; ~/.cache/offsetjax/plan without it")
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
    sub.add_argument("--seed", action="append", type=int, help="may be given several times; 0 without it")
    sub.add_argument(
        "--start_noise",
        choices=("matched", "plain"),
        help="start from the noise of training, or from plain noise as other programs do",
    )
    sub.add_argument("--sampler", help="ddim, ddpm, euler, euler_ancestral or dpmpp_2m")
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
        choices=("diffusers", "single_file", "lora"),
        default="diffusers",
        help="a directory; one file in the original layout; the adapters of a LoRA training. Default: %(default)s",
    )
    sub.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the weights; %(default)s without it",
    )
    sub.add_argument("--lora_keys", choices=("kohya", "diffusers"), help="of --format=lora; kohya without it")
    sub.add_argument("--max_shard_gb", type=float, help="split a directory's weights beyond this; 10 without it")
    sub.add_argument("--out", required=True, help="a folder, or FILE.safetensors, that does not exist yet")

    sub = command("data", None, "build, encode or inspect a data set")
    data = sub.add_subparsers(required=True, metavar="build|encode|inspect")
    sub = data.add_parser("build", help="a folder of captioned images → ArrayRecord", allow_abbrev=False)
    sub.set_defaults(run=_data_build)
    sub.add_argument("--images", required=True, help="images with metadata.jsonl, or name.txt beside name.png")
    sub.add_argument("--out", required=True)
    sub.add_argument("--max_dropped", type=float, default=0.1, help="the share of broken images that is accepted")
    sub = data.add_parser("encode", help="the latents of a data set, to train from", allow_abbrev=False)
    sub.set_defaults(run=_data_encode)
    sub.add_argument("--config", required=True, help="the config file of the training to be")
    sub.add_argument("--out", required=True, help="a folder for data.path, with data.cached_latents=True, or gs://…")
    sub.epilog = f"What was interrupted goes on with the parts that are missing. {_OVERRIDES}"
    sub = data.add_parser("inspect", help="what a data set holds", allow_abbrev=False)
    sub.set_defaults(run=_data_inspect)
    sub.add_argument("--data", required=True)
    sub.add_argument("--split", default="train", help="of the data set, such as test or train[:10%%]; %(default)s")
    sub.add_argument("--out", help="a PNG for the contact sheet")

    sub = command("report", _report, "compare runs on one HTML page")
    sub.add_argument(
        "--workdir", action="append", required=True, help="of a training or of a sweep; may be given several times"
    )
    sub.add_argument("--out", required=True, help="FILE.html")

    sub = command("config", _config, "show the fields of a config: what they are, and what other trainers call them")
    sub.add_argument(
        "name", nargs="?", default="", help="a section, a field, or a setting of another trainer; all without it"
    )
    sub.add_argument("--markdown", action="store_true", help="all of them as a page, offsetjax/config/REFERENCE.md")

    sub = command("demo", _demo, "re-enact the article's experiment")
    sub.add_argument("--out", default="demo", help="a folder for its runs and its report")
    return parser


def _checkpoint_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--step", type=int, help="the newest without it")
    sub.add_argument("--params", choices=("ema", "raw"), help="averaged or not; the config's sample.params without it")


def _check_paths(options: argparse.Namespace) -> None:
    for name, value in vars(options).items():
        if name in ("config", "workdir", "model", "compare", "images", "data", "out", "cache_dir") and value == "":
            raise UserError(f"--{name} is empty; give a path")


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

    with processes.together(partial(_explain, resumes=_RESUMES[_train])):
        from offsetjax.config import digest, load_config

        config = load_config(options.config, _overrides(rest))
        logging.getLogger("offsetjax").info("%s, sha256 %s", options.config, digest(options.config)[:16])
        from offsetjax.train import train

        train(config, options.workdir)


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

    print("\n".join(listing(options.config, options.workdir, _overrides(rest))))


def _calibrate(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from offsetjax.parallel import processes

    with processes.together(_explain):
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

    build(options.images, options.out, options.max_dropped)


def _data_encode(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from offsetjax.parallel import processes

    with processes.together(partial(_explain, resumes=_RESUMES[_data_encode])):
        from offsetjax.config import load_config

        config = load_config(options.config, _overrides(rest))
        from offsetjax.prepare.latents import encode_data

        encode_data(config, options.out)


def _data_inspect(options: argparse.Namespace, rest: Sequence[str]) -> None:
    _no_more(rest)
    from offsetjax.data.build import inspect

    inspect(options.data, options.out, options.split)


def _report(options: argparse.Namespace, rest: Sequence[str]) -> None:
    _no_more(rest)
    from offsetjax.report import report

    report(options.workdir, options.out)


def _config(options: argparse.Namespace, rest: Sequence[str]) -> None:
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
    from offsetjax.article.demo import demo

    demo(epath.Path(options.out))


_RESUMES: dict[Command, str] = {_train: "from the last checkpoint", _data_encode: "with the parts that are missing"}
