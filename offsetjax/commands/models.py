"""What is done with a training's model: `sample`, `export`, `checkpoint` and `report`."""

import argparse
from collections.abc import Sequence

from offsetjax.commands.shared import DEBUG, AddCommand, alone, choice, no_more
from offsetjax.errors import UserError


def add_sample(command: AddCommand) -> None:
    """Adds `sample`."""
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
        type=choice("sample.start_noise"),
        help="start from the noise of training, matched, or from plain noise as other programs do",
    )
    sub.add_argument("--sampler", type=choice("sample.sampler"), help="see `offsetjax config sample.sampler`")
    sub.add_argument("--guidance_scale", type=float, help="of the prompt; 1: none, the prompt is followed as learnt")
    sub.add_argument(
        "--guidance_rescale", type=float, help="how much of the contrast that guidance adds is undone, 0 to 1"
    )
    sub.add_argument("--num_steps", type=int, help="of the sampler")
    sub.add_argument("--shift", type=float, help="of a flow's grid of timesteps, in place of its own at the size")
    sub.add_argument("--size", metavar="WxH", help="of the pictures, such as 1152x896; by default squares, as trained")
    sub.add_argument(
        "--brightness",
        action="append",
        type=float,
        help="of the start, in standard deviations, from dark (-2) to bright (2); may be given several times",
    )
    sub.add_argument("--out", required=True, help="a folder for the pictures")
    sub.epilog = (
        "How to draw, where it is not given, is in the config's section sample; of a --model the defaults are taken, "
        "and its noise and size are read from its file, or from that of --lora if offsetjax wrote it."
    )


def add_export(command: AddCommand) -> None:
    """Adds `export`."""
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


def add_checkpoint(command: AddCommand) -> None:
    """Adds `checkpoint`."""
    sub = command("checkpoint", None, "list, verify or prune what a training has saved")
    kinds = sub.add_subparsers(required=True, metavar="list|verify|prune")
    for name, help in (
        ("list", "the steps and their sizes"),
        ("verify", "read every array, or every tensor of an exported model, and compare it with its checksum"),
        ("prune", "delete all but the newest steps, once these are verified"),
    ):
        sub = kinds.add_parser(name, help=help, allow_abbrev=False, parents=[DEBUG])
        sub.set_defaults(run=_CHECKPOINT[name])
        if name == "verify":
            which = sub.add_mutually_exclusive_group(required=True)
            which.add_argument("--workdir", help="of a training")
            which.add_argument("exported", nargs="?", metavar="FILE_OR_DIRECTORY", help="of `offsetjax export`")
            sub.add_argument("--step", type=int, help="only this one, of --workdir")
        else:
            sub.add_argument("--workdir", required=True, help="of a training")
        if name == "prune":
            sub.add_argument("--keep", type=int, required=True, help="how many steps stay")


def add_report(command: AddCommand) -> None:
    """Adds `report`."""
    sub = command("report", _report, "compare runs on one HTML page")
    sub.add_argument(
        "--workdir", action="append", required=True, help="of a training or of a sweep; may be given several times"
    )
    sub.add_argument("--out", required=True, help="FILE.html")


def _checkpoint_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--step", type=int, help="the newest by default")
    sub.add_argument(
        "--params", type=choice("sample.params"), help="averaged or not; by default the config's sample.params"
    )


def _sample(options: argparse.Namespace, rest: Sequence[str]) -> None:
    no_more(rest)
    alone("sample")
    for name in ("step", "params") if options.model else ("lora", "variant"):
        if getattr(options, name) not in (None, ""):
            raise UserError(f"sample: --{name} cannot apply to --{'model' if options.model else 'workdir'}")
    from offsetjax.models.trained import Trained, check_model, load_model, load_trained
    from offsetjax.sampling.sample import compare, sample

    settings = {
        key: getattr(options, key)
        for key in ("start_noise", "sampler", "guidance_scale", "guidance_rescale", "num_steps", "shift", "size")
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
    no_more(rest)
    alone("export")
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


def _checkpoint_list(options: argparse.Namespace, rest: Sequence[str]) -> None:
    no_more(rest)
    from offsetjax.storage.command import list_steps

    list_steps(options.workdir)


def _checkpoint_verify(options: argparse.Namespace, rest: Sequence[str]) -> None:
    no_more(rest)
    if options.exported is not None:
        if options.step is not None:
            raise UserError("checkpoint: --step cannot apply to an exported model; leave it out")
        from offsetjax.storage.exported import verify_export

        verify_export(options.exported)
        return
    from offsetjax.storage.command import verify

    verify(options.workdir, options.step)


def _checkpoint_prune(options: argparse.Namespace, rest: Sequence[str]) -> None:
    no_more(rest)
    from offsetjax.storage.command import prune

    prune(options.workdir, options.keep)


_CHECKPOINT = {"list": _checkpoint_list, "verify": _checkpoint_verify, "prune": _checkpoint_prune}


def _report(options: argparse.Namespace, rest: Sequence[str]) -> None:
    no_more(rest)
    from offsetjax.report import report

    report(options.workdir, options.out)
