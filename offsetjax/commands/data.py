"""Data sets: `data build`, `data encode`, `data inspect`, and `pictures` to try the rest with."""

import argparse
from collections.abc import Sequence
from functools import partial

from offsetjax.commands.explain import explain
from offsetjax.commands.shared import DEBUG, OVERRIDES, AddCommand, add_stage, no_more, overrides
from offsetjax.errors import UserError

_IMAGES = (
    "a folder of pictures with metadata.jsonl, or name.txt beside name.png; or a folder, a file or a pattern of tars "
    "or of tables in Parquet, local or gs://, such as 'shards/*.parquet' or 'shards/{00000..00099}.tar'"
)
_LABEL_TEMPLATE = "caption of a picture that has a class alone, such as its folder's name: 'a photo of a {label}'"
_TEXT_LINES = "of a text file with several lines: they are one caption, the first is it, or each is one"


def add_data(command: AddCommand) -> None:
    """Adds `data`."""
    sub = command("data", None, "build, encode or inspect a data set")
    data = sub.add_subparsers(required=True, metavar="build|encode|inspect")
    sub = data.add_parser(
        "build",
        help="captioned pictures, in a folder, tars or tables → ArrayRecord",
        allow_abbrev=False,
        parents=[DEBUG],
    )
    sub.set_defaults(run=_data_build)
    sub.add_argument("--images", required=True, help=_IMAGES)
    sub.add_argument("--out", required=True)
    sub.add_argument("--max_dropped", type=float, default=0.1, help="the share of broken pictures that is accepted")
    sub.add_argument("--min_side", type=int, default=0, help="leave out pictures with a shorter side below; in pixels")
    sub.add_argument("--max_aspect", type=float, default=0.0, help="leave out longer ones: longer over shorter side")
    sub.add_argument("--drop_animated", action="store_true", help="leave out animations; else the first frame is taken")
    sub.add_argument("--drop_duplicates", action="store_true", help="leave out what has the pixels of one before")
    sub.add_argument("--text_lines", choices=("whole", "first", "each"), default="whole", help=_TEXT_LINES)
    sub.add_argument("--no_repeats", action="store_true", help="folders called `10_a cat` are not kohya's")
    sub.add_argument("--label_template", default="", help=_LABEL_TEMPLATE)
    sub.add_argument("--follow_links", action="store_true", help="links may lead out of the folder")
    sub.add_argument("--image_column", default="", help="of tables; by default it is found by its name and type")
    sub.add_argument("--caption_column", default="", help="of tables; by default text, caption or prompt")
    sub.add_argument("--skip_damaged", action="store_true", help="take what can be read of damaged tars and tables")
    sub.add_argument("--workers", type=int, default=0, help="processes; by default as many as there are cores")
    sub = data.add_parser(
        "encode", help="the latents of a data set, to train from", allow_abbrev=False, parents=[DEBUG]
    )
    sub.set_defaults(run=_data_encode, resumes="with the parts that are missing", is_together=True)
    sub.add_argument("--config", required=True, help="the config file of the training to be")
    sub.add_argument("--out", required=True, help="a folder for data.path, with data.cached_latents=True, or gs://…")
    add_stage(sub)
    sub.epilog = f"What was interrupted is resumed with the parts that are missing. {OVERRIDES}"
    sub = data.add_parser("inspect", help="what a data set holds", allow_abbrev=False, parents=[DEBUG])
    sub.set_defaults(run=_data_inspect)
    sub.add_argument("--data", required=True)
    sub.add_argument("--split", default="train", help="of the data set, such as test or train[:10%%]; %(default)s")
    sub.add_argument("--image_feature", default="image", help="as data.image_feature; %(default)s")
    sub.add_argument("--caption_feature", default="caption", help="as data.caption_feature; %(default)s")
    sub.add_argument("--label_template", default="", help="as data.label_template")
    sub.add_argument("--out", help="a PNG for the contact sheet; NAME_sizes.png is beside it")


def add_pictures(command: AddCommand) -> None:
    """Adds `pictures`."""
    sub = command("pictures", None, "write captioned pictures to try the rest with")
    kinds = sub.add_subparsers(required=True, metavar="article|forty|stamps")
    for name, help in (
        ("article", "procedural scenes of any brightness, that the base model of the demonstration is pretrained on"),
        ("forty", "40 of these, whose captions decide on their brightness, that the demonstration fine-tunes on"),
        ("stamps", "real ones: Tux Paint's stamps, each on four grounds"),
    ):
        sub = kinds.add_parser(name, help=help, allow_abbrev=False, parents=[DEBUG])
        sub.set_defaults(run=_pictures, kind=name)
        sub.add_argument("--out", required=True, help="a folder that does not exist yet, for data build")
        if name == "article":
            sub.add_argument("--count", type=int, default=2048, help="default: %(default)s")
        if name != "stamps":
            sub.add_argument("--seed", type=int, default=1 if name == "forty" else 0, help="default: %(default)s")
        else:
            sub.add_argument("--stamps", help="a folder of stamps; by default those of tuxpaint-stamps-default")
            sub.add_argument("--size", type=int, default=128, help="the side of a picture, in pixels; %(default)s")


def _data_build(options: argparse.Namespace, rest: Sequence[str]) -> None:
    no_more(rest)
    from offsetjax.data.build import build
    from offsetjax.data.cleaning import Cleaning

    build(
        options.images,
        options.out,
        options.max_dropped,
        workers=options.workers,
        cleaning=Cleaning(options.min_side, options.max_aspect, options.drop_animated, options.drop_duplicates),
        lines=options.text_lines,
        repeats=not options.no_repeats,
        follow_links=options.follow_links,
        label_template=options.label_template,
        image_column=options.image_column,
        caption_column=options.caption_column,
        skip_damaged=options.skip_damaged,
    )


def _data_encode(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from offsetjax.parallel import processes

    with processes.together(partial(explain, options=options)):
        from offsetjax.config import config_of_stage, load_config

        config = config_of_stage(load_config(options.config, overrides(rest)), options.stage)
        from offsetjax.prepare.latents import encode_data

        encode_data(config, options.out)


def _data_inspect(options: argparse.Namespace, rest: Sequence[str]) -> None:
    no_more(rest)
    from offsetjax.data.inspect import inspect
    from offsetjax.data.source import Features

    features = Features(options.image_feature, options.caption_feature, options.label_template)
    inspect(options.data, options.out, options.split, features)


def _pictures(options: argparse.Namespace, rest: Sequence[str]) -> None:
    no_more(rest)
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
