"""The training stream: a source → batches, through Grain.

A batch is a function of the seed and of its number alone. Grain shuffles each epoch, repeats for ever and draws the
flips, all by the position in one infinite sequence, of which a process takes its own rows of each global batch. So the
whole state of the data is one integer, the number of the next batch, and a run may continue with another number of
processes or workers and still see the same global batches.

With pictures of several sizes (`sizes.py`) the order is that of a `BatchPlan`: all examples of a batch have one size.
"""

import logging
import math
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import grain
import numpy as np
from absl import flags
from jaxtyping import Int

from offsetjax.data.batches import BatchPlan
from offsetjax.data.buckets import Size, square
from offsetjax.data.caption_rules import CaptionRules
from offsetjax.data.images import CENTRE
from offsetjax.data.mixed import Mixed
from offsetjax.data.sizes import Buckets
from offsetjax.data.source import Source, describe, seen
from offsetjax.data.stages import MOST_TRIES, Batches, BatchesOfThreads, Following, Order, Planned, Rows, Share, Sized
from offsetjax.errors import StorageError, TransientError, UserError
from offsetjax.parallel.signals import end_with_parent

AS_THEY_ARE = CaptionRules()
_log = logging.getLogger("offsetjax")

# How each field of a fingerprint is called in a config, for the remedy.
_CONFIG_NAMES = {
    "seed": "seed",
    "split": "data.split",
    "global_batch_size": "train.global_batch_size",
    "resolution": "data.resolution",
    "random_flip": "data.random_flip",
    "random_crop": "data.random_crop",
    "sizes": "data.buckets",
    "batch_sizes": "data.equal_tokens",
    "shift": "train.stages",
    "parts": "data.mixed_sizes",
}

# A caption's ids by text encoder, how many tokens it had before it was cut, and how many are read.
Tokenize = Callable[[str], tuple[Mapping[str, Int[np.ndarray, " n"]], int, int]]


@dataclass(frozen=True)
class Stream:
    """Batches for ever, from any number on; `make_stream` makes one."""

    source: Source
    seed: int
    global_batch_size: int
    resolution: int
    random_flip: bool
    tokenize: Tokenize
    long_captions: Literal["truncate", "refuse"] = "truncate"
    num_workers: int = 0
    rows: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # this process's, by a batch's size
    max_bad_fraction: float = 0.0
    buckets: Buckets | None = None  # None: squares of `resolution`
    random_crop: bool = False
    shift: int = 0  # batch number n is that of number n + shift in the order of these pictures, see `going_on_after`
    captions: CaptionRules = AS_THEY_ARE
    parts: int = 1  # of a batch, each of one size: with several, these are what is read one after the other

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes that its batches have: as many programs are compiled."""
        if not self.buckets:
            return (square(self.resolution),)
        pairs = zip(self.buckets.sizes, self.buckets.plan.groups, strict=True)
        return tuple(size for size, group in pairs if len(group))

    @property
    def batch_sizes(self) -> dict[Size, int]:
        """How many examples a batch of each size, or a part of one, has, over all processes."""
        if not self.buckets:
            return {square(self.resolution): self.global_batch_size}
        pairs = zip(self.buckets.sizes, self.buckets.plan.batch_sizes, strict=True)
        return {size: count for size, count in pairs if size in self.sizes}

    def whole_size(self, count: int) -> int:
        """How many examples a batch has over all processes, of which so many are this one's."""
        return next(size for size, rows in self.rows.items() if len(rows) == count)

    def examples_before(self, number: int) -> int:
        """How many examples the batches before that one have."""
        plan, number = self.buckets.plan if self.buckets else None, self._parts(number).start
        return plan.examples_before(number) if isinstance(plan, BatchPlan) else number * self.global_batch_size

    def going_on_after(self, examples: int, number: int) -> "Stream":
        """The same batches, of which that number is the first before which as many examples have been shown.

        So a stage of a training goes on in its data where the one before has stopped, whatever its batches are; fewer
        examples than a batch has are left out.
        """
        whole = replace(self, shift=0)
        low, high = -1, 1
        while whole.examples_before(high) < examples:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if whole.examples_before(middle) >= examples else (middle, high)
        return replace(self, shift=high - number)

    def sizes_of(self, number: int) -> tuple[Size, ...]:
        """The sizes of the parts of a batch: one, where it has no parts."""
        if not self.buckets:
            return (square(self.resolution),)
        return tuple(self.buckets.sizes[self.buckets.plan.size_of(part)] for part in self._parts(number))

    def _parts(self, number: int) -> range:
        """The numbers, in the order of these pictures, of the parts of a batch."""
        first = (number + self.shift) * self.parts
        return range(first, first + self.parts)

    def iterator(self, start_batch: int = 0) -> Generator[dict[str, Any], None, None]:
        """The batches of this process, or their parts, from number `start_batch` on; close it when done.

        Yields:
            the fields of the source's records (`offsetjax.data.source.Record.view`): `pixels` uint8
            `[b, height, width, 3]`, or of latents `moments` float16 `[b, 2, c, h, w]`, and `time_ids` float32
            `[b, 6]`; `input_ids` by text encoder, int32 `[b, n]`; `is_truncated` bool `[b]`, whose captions were cut;
            `is_replaced` bool `[b]`, which stand in the place of a record that cannot be read; `index` int64 `[b]`, the
            number of each example in the source. b is the number of this process's rows.

        Raises:
            UserError: a record that cannot be decoded, where none may be left out, or 64 of them in a row; or a
                caption that is refused for its length.
        """
        iterator = iter(_batches(self, self._parts(start_batch).start))
        try:
            yield from iterator
        except (UserError, TransientError, StorageError) as error:  # of one line, to which Grain adds its own
            raise type(error)(str(error).partition("\n")[0]) from error
        finally:
            iterator.close()

    def examples_of(self, number: int) -> list[int]:
        """The examples of a whole global batch, by their numbers in the source, in their order; none is read.

        One that cannot be read is replaced in training, see `data.max_bad_fraction`, and is listed here all the same.
        """
        if plan := self.buckets.plan if self.buckets else None:
            return [int(example) for part in self._parts(number) for example in plan.batch(part).examples]
        order, first = _order(self), self._parts(number).start * self.global_batch_size
        return [order[first + row][0] for row in range(self.global_batch_size)]

    def fingerprint(self) -> dict[str, Any]:
        """What decides on the batches, for `check_fingerprint`; JSON holds it unchanged."""
        return {
            **self.source.fingerprint(),
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "resolution": self.resolution,
            "random_flip": self.random_flip,
            **(self.buckets.fingerprint() if self.buckets else {}),
            **({"random_crop": True} if self.random_crop else {}),
            **({"shift": self.shift} if self.shift else {}),
            **({"parts": self.parts} if self.parts > 1 else {}),
        }


def make_stream(
    source: Source,
    *,
    seed: int,
    global_batch_size: int,
    resolution: int,
    random_flip: bool,
    tokenize: Tokenize,
    long_captions: Literal["truncate", "refuse"] = "truncate",
    num_workers: int = 0,
    rows: Sequence[int] | Mapping[int, Sequence[int]] | None = None,
    max_bad_fraction: float = 0.0,
    buckets: Buckets | None = None,
    random_crop: bool = False,
    captions: CaptionRules = AS_THEY_ARE,
) -> Stream:
    """The stream of a source.

    Args:
        seed: of the order and the flips, below 2**32.
        global_batch_size: examples a batch, over all processes.
        tokenize: a caption's ids and number of tokens; it runs in this process, whatever `num_workers` is.
        long_captions: what becomes of a caption with more tokens than the text encoders read.
        num_workers: processes that read and decode; 0: threads of this one.
        rows: of each global batch, those that this process reads, in order, or these by a batch's size; None: all.
        max_bad_fraction: of the records that may be left out, for `check_replaced`; 0: the first ends the stream.
        buckets: the sizes of the pictures, where there are several, and their batches.
        random_crop: what is cropped of a picture is drawn, as its flip is; else it is its centre.
        captions: what becomes of them.
    """
    batch_sizes = set(buckets.plan.batch_sizes) if buckets else {global_batch_size}
    by_size = rows if isinstance(rows, Mapping) else dict.fromkeys(batch_sizes, rows)
    of_process = {size: tuple(range(size) if by_size[size] is None else by_size[size]) for size in batch_sizes}  # type: ignore[arg-type]
    return Stream(
        source=source,
        seed=seed,
        global_batch_size=global_batch_size,
        resolution=resolution,
        random_flip=random_flip,
        tokenize=tokenize,
        long_captions=long_captions,
        num_workers=num_workers,
        rows=of_process,
        max_bad_fraction=max_bad_fraction,
        buckets=buckets,
        random_crop=random_crop,
        captions=captions,
    )


def check_replaced(stream: Stream, replaced: int, num_seen: int) -> None:
    """Compares the examples that stood in for records that cannot be read with what is allowed.

    The counts are those of the whole run, so that every process and every resumption judges alike. All records of an
    epoch that has begun count as seen, or a bad one in the first batch would be a large part.

    Args:
        replaced, num_seen: examples, since step 0.

    Raises:
        UserError: there were more than `max_bad_fraction` of them.
    """
    epochs = max(1, math.ceil(num_seen / len(stream.source)))
    if replaced > stream.max_bad_fraction * epochs * len(stream.source):
        raise UserError(
            f"data: {replaced} records of {stream.source.label} could not be read in {num_seen} examples, more than "
            f"data.max_bad_fraction = {stream.max_bad_fraction:g} allows; the log names them: build the data set again "
            "with `offsetjax data build`, or raise data.max_bad_fraction"
        )


def check_fingerprint(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Compares the stream of a checkpoint with the present one.

    Raises:
        UserError: with the first field that differs; resuming would repeat and miss examples.
    """
    for name in {**saved, **now}:
        before, after = saved.get(name), now.get(name)
        if before != after:
            remedy = f"set {_CONFIG_NAMES[name]} back" if name in _CONFIG_NAMES else "give data.path the same data"
            raise UserError(
                f"data: {name} is {after!r}, but the checkpoint was written with {before!r}; "
                f"{remedy}, or start a new --workdir"
            )


def _order(stream: Stream) -> grain.MapDataset:
    """The number and the size of each example, for ever."""
    if stream.buckets:
        return Planned(stream.buckets).seed(stream.seed)
    numbers = grain.MapDataset.source(range(len(stream.source))).seed(stream.seed).shuffle().repeat(None)
    return numbers.map(partial(_sized, square(stream.resolution)))


def _batches(stream: Stream, start_batch: int) -> grain.IterDataset:
    changes = stream.source.captions if isinstance(stream.source, Mixed) else ({},)
    rules = tuple(stream.captions.changed(each) for each in changes)
    show = partial(_shown, stream.source, stream.max_bad_fraction > 0, rules=(rules, stream.seed))
    order = Order(_order(stream))
    examples = order.map(partial(show, False, CENTRE))
    if stream.random_flip or stream.random_crop:
        drawn = partial(_drawn, show, stream.random_flip, stream.random_crop)
        examples = order.random_map(drawn, seed=_flip_seed(stream.seed))
    share = Share(stream.rows, stream.buckets.plan if stream.buckets else None)
    examples = Rows(examples, share)
    if stream.num_workers:
        if not flags.FLAGS.is_parsed():  # Grain hands its flags to the workers, also in a program without absl.app
            flags.FLAGS.mark_as_parsed()
        whole = examples.batch(share.most) if share.is_even else Batches(examples, share)
        batches = whole[start_batch:].to_iter_dataset(grain.ReadOptions(0, 0))
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(stream.num_workers, per_worker_buffer_size=2))
    else:  # threads share the examples of one batch, so that the first is there soon and few are held
        threads = min(16, 2 * (os.cpu_count() or 1))
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, share.most))
        read = examples[start_batch * share.most :].to_iter_dataset(options)
        batches = read.batch(share.most) if share.is_even else BatchesOfThreads(read, share, start_batch)
    # The tokenizer stays out of the workers, which would import all of its and the models' libraries with it.
    tokenized = batches.map(partial(_tokenized, stream, set()))
    return grain.experimental.ThreadPrefetchIterDataset(tokenized, prefetch_buffer_size=2)


def _flip_seed(seed: int) -> int:
    """The flips' own seed: by default Grain takes the depth of the pipeline, which its stages would change."""
    return int(np.random.SeedSequence((seed, 4)).generate_state(1)[0])


def _sized(size: Size, index: int) -> Sized:
    return index, size


def _shown(
    source: Source,
    may_be_bad: bool,
    is_mirrored: bool,
    place: float,
    following: Following,
    rules: tuple[Sequence[CaptionRules], int] = ((AS_THEY_ARE,), 0),
) -> dict[str, Any]:
    """The first example of an order that can be read, and why those before it cannot.

    Args:
        rules: of captions, of each source where it is several; and the seed of what they draw.
    """
    end_with_parent()  # where this is a worker, which nobody else would end after a SIGKILL
    problems: list[str] = []
    for index, size in following:
        try:
            record = source[index]
            fields = seen(source, index, record, size, is_mirrored, place)
        except UserError as error:
            if not may_be_bad:
                raise
            problems.append(str(error))
        else:
            number = source.located(index)[0] if isinstance(source, Mixed) else 0
            captions = (record.caption, *getattr(record, "others", ()))
            caption = rules[0][number].caption(captions, rules[1], following.place)
            return {**fields, "caption": caption, "problems": "\n".join(problems), "index": np.int64(index)}
    raise UserError(f"{problems[0]} (and so are the {MOST_TRIES - 1} that follow it)")


def _drawn(
    show: Callable[[bool, float, Following], dict[str, Any]],
    random_flip: bool,
    random_crop: bool,
    following: Following,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """An example as it is drawn; flips are the same with random crops and without."""
    is_mirrored, place = bool(rng.random() < 0.5), float(rng.random())
    return show(is_mirrored and random_flip, place if random_crop else CENTRE, following)


def _tokenized(stream: Stream, reported: set[str], batch: dict[str, Any]) -> dict[str, Any]:
    is_replaced = np.array([bool(problems) for problems in batch["problems"]])
    for problem in {line for problems in batch["problems"] for line in str(problems).split("\n") if line} - reported:
        reported.add(problem)
        _log.warning("%s; another takes its place", problem)
    tokens = [stream.tokenize(str(caption)) for caption in batch["caption"]]
    rows = [ids for ids, *_ in tokens]
    input_ids = {part: np.stack([np.asarray(ids[part], np.int32) for ids in rows]) for part in rows[0]}
    is_truncated = np.array([count > limit for _, count, limit in tokens])
    if stream.long_captions == "refuse" and is_truncated.any():
        first = int(is_truncated.argmax())
        which = describe(stream.source, batch["index"][first])
        raise UserError(
            f"data: the caption of {which} has {tokens[first][1]} tokens, but the text encoders "
            f"read {tokens[first][2]}; shorten it, or set encode.long_captions='truncate'"
        )
    own = {name: _own(field) for name, field in batch.items() if name not in ("caption", "problems")}
    return {**own, "input_ids": input_ids, "is_truncated": is_truncated, "is_replaced": is_replaced}


def _own(array: np.ndarray) -> np.ndarray:
    """A plain array: what workers send lies in shared memory, which must be gone before the program ends."""
    return array if type(array) is np.ndarray else np.array(array)
