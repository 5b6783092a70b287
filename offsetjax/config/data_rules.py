"""Which settings of data, sizes, captions and mixes go together: one that cannot apply is refused."""

from collections.abc import Iterator, Mapping
from typing import Any

from offsetjax.config.mix import parts_of
from offsetjax.config.schema import default as default_of
from offsetjax.errors import UserError

Values = Mapping[str, Any]  # by path
Wrongs = Iterator[tuple[object, str]]  # whether something is wrong, and what


def data_rules(values: Values) -> Wrongs:
    """Whether something is wrong, and what, for the values of a config by their paths."""
    for rules in (_sizes, _captions, _mix):
        yield from rules(values)


def _sizes(values: Values) -> Wrongs:
    """Settings of pictures of several sizes that could not apply."""
    given, count = values["data.buckets"], values["data.bucket_count"]
    yield given and count, "data.buckets gives the sizes that data.bucket_count would choose; leave one of them out"
    for path, needed in (
        ("data.bucket_step", count),
        ("data.equal_tokens", given or count),
        ("data.max_aspect", given or count),
        ("data.max_enlargement", given or count),
    ):
        what = "data.bucket_count" if path == "data.bucket_step" else "data.buckets or data.bucket_count"
        yield values[path] != default_of(path) and not needed, f"{path} cannot apply without {what}"
    mixed, several = values["data.mixed_sizes"], given or count
    yield mixed and not several, "data.mixed_sizes cannot apply without data.buckets or data.bucket_count"
    yield (
        mixed and several and values["train.accumulate_steps"] == 1,
        "data.mixed_sizes cannot apply with train.accumulate_steps = 1, for a part has one size; set it to 2 or more",
    )
    yield (
        values["data.random_crop"] and values["data.cached_latents"],
        "data.random_crop cannot apply with data.cached_latents, which are of central crops; leave it out",
    )
    yield (
        values["data.equal_tokens"] and values["timesteps.stratified"],
        "timesteps.stratified cannot apply with data.equal_tokens, whose batches differ; set one of them back",
    )


def _captions(values: Values) -> Wrongs:
    """Rules of captions that could not apply."""
    tags = values["captions.shuffle_tags"] or values["captions.tag_dropout"]
    for name, is_set, is_needed, needs in (
        ("weights", values["captions.weights"], values["captions.several"] == "draw", "captions.several = 'draw'"),
        ("keep_tags", values["captions.keep_tags"], tags, "captions.shuffle_tags or captions.tag_dropout"),
        (
            "separator",
            values["captions.separator"] != ",",
            tags or values["captions.trigger"],
            "captions.shuffle_tags, captions.tag_dropout or captions.trigger",
        ),
    ):
        yield is_set and not is_needed, f"captions.{name} cannot apply without {needs}"
    bad = [each for each in values["captions.templates"] if "{caption}" not in each]
    yield bad, f"captions.templates has {bad[:1]}, without a place for the caption; write 'a photo, {{caption}}'"
    yield (
        values["captions.several"] == "draw" and values["data.cached_latents"],
        "captions.several = 'draw' cannot apply with data.cached_latents, which has each picture's first caption; "
        "set it back",
    )


def _mix(values: Values) -> Wrongs:
    """Several data sets, and what is said of each."""
    mix = values["data.mix"]
    for path, default in (("data.weight", 0.0), ("data.repeats", 1)):
        yield values[path] != default, f"{path} is of one data set among several; write it in a text of data.mix"
    if not mix:
        return
    yield values["data.path"], "data.path cannot apply with data.mix, each of whose texts has its own; leave it out"
    yield (
        values["data.cached_latents"],
        "data.mix cannot apply with data.cached_latents, which are of one data set; leave one of them out",
    )
    try:
        parts = parts_of(mix)
    except UserError as error:
        yield True, str(error).removeprefix("config: ")
        return
    for number, part in enumerate(parts, start=1):
        own = {**values, **{f"captions.{name}": value for name, value in part.captions.items()}}
        yield from ((wrong, f"data.mix, data set {number}: {what}") for wrong, what in _captions(own))
