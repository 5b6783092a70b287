"""Pictures with captions, wherever they lie → a TFDS data set in ArrayRecord, with no tensorflow.

Each process writes whole shards of its own, under names that identify their items; an interrupted build continues with
those that are missing. `build.json` says what is being built and is the first file; `dataset_info.json` is the
last.
"""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
from etils import epath

from offsetjax import log
from offsetjax.data.cleaning import Cleaning, duplicates, is_chosen
from offsetjax.data.items import Items, Listing, shown
from offsetjax.data.places import list_pictures
from offsetjax.data.shards import INFO, REPEATS_FILE, SIZES_FILE, shard_paths, write_info
from offsetjax.data.task import Result, Task, features
from offsetjax.errors import UserError
from offsetjax.files import write_whole
from offsetjax.json_text import parse_object
from offsetjax.progress import tracked

DROPPED_FILE = "dropped.json"
SHARD_SIZE = 1024  # items
_NAME, _VERSION, _DESCRIPTION = "pictures", "1.0.0", "build.json"


@dataclass(frozen=True)
class Summary:
    """What `build` made.

    Attributes:
        path: the version folder.
        splits: how many pictures each split holds.
        dropped: (name, reason) of those that it does not hold.
        notes: what else there is to say, a line each.
    """

    path: str
    splits: dict[str, int]
    dropped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()

    @property
    def kept(self) -> int:
        """How many pictures the data set holds."""
        return sum(self.splits.values())

    def __str__(self) -> str:
        each = ", ".join(f"{count} of {split}" for split, count in self.splits.items())
        text = f"{self.path}: {self.kept} pictures" + (f" ({each})" if len(self.splits) > 1 else "")
        return f"{text}, {len(self.dropped)} dropped" + (f": {reasons(self.dropped)}" if self.dropped else "")


def build(
    images: epath.PathLike,
    out_dir: epath.PathLike,
    max_dropped: float = 0.1,
    *,
    workers: int = 0,
    shard_size: int = SHARD_SIZE,
    cleaning: Cleaning | None = None,
    **options: Any,
) -> Summary:
    """Builds the data set `pictures` and prints what it holds.

    Pictures that any decoder shows right keep their bytes; the others become PNGs of what a viewer shows. Broken
    pictures and those without a caption are left out; `dropped.json` in the data set names them with the reason.

    Args:
        images: a folder of pictures, a file of many, or a pattern of files, as `offsetjax.data.places` says.
        out_dir: where `pictures/1.0.0` is put; no reader takes it for a data set until it is complete.
        max_dropped: the share of the pictures that may be left out for what is wrong with them.
        cleaning: what is left out by choice.
        workers: processes; 0: as many as this machine has cores, where there are as many shards.
        options: as for `list_pictures`.

    Raises:
        UserError: nothing to read, too much to drop, or something else is in `out_dir`.
    """
    out = epath.Path(out_dir)
    if not 0 <= max_dropped <= 1:
        raise UserError(f"data: --max_dropped={max_dropped} must be between 0 and 1")
    folder = out / _NAME / _VERSION
    _check_free(out, folder)
    listing, cleaning = list_pictures(images, **options), cleaning or Cleaning()
    chosen = {name: value for name, value in asdict(cleaning).items() if value}
    _begin(out, folder, _plan(listing, shard_size, {**options, **chosen}))
    splits = listing.splits.items()
    tasks = [replace(task, cleaning=cleaning) for each in splits for task in _tasks(folder, *each, shard_size)]
    _write_all([task for task in tasks if not task.is_done], workers, "Reading pictures")
    if cleaning.drop_duplicates:
        twice = duplicates(task.result().known for task in tasks)
        again = [replace(task, left_out=each) for task, each in zip(tasks, twice, strict=True) if each]
        _write_all(again, workers, "Leaving out duplicates")
    results = {task.path.name: task.result() for task in tasks}
    total = sum(map(len, listing.splits.values())) + len(listing.dropped)
    dropped = (*(each for result in results.values() for each in result.dropped), *listing.dropped)
    try:
        _check_dropped(dropped, total, max_dropped)
    except UserError:
        if len(tasks) == 1:  # of more, another try with a larger --max_dropped need not read them again
            _remove(out)
        raise
    kept = {split: [results[task.path.name] for task in tasks if task.split == split] for split in listing.splits}
    write_whole(folder / DROPPED_FILE, json.dumps(dict(dropped), indent=2) + "\n")
    if listing.repeats:
        repeats = {split: _kept_repeats(runs, kept[split]) for split, runs in listing.repeats.items()}
        write_whole(folder / REPEATS_FILE, json.dumps(repeats) + "\n")
    write_whole(folder / SIZES_FILE, _sizes(kept))
    lengths = {split: [result.kept for result in each] for split, each in kept.items()}
    write_info(folder, _NAME, _VERSION, "Pictures with captions, built by offsetjax.", features(), lengths)
    for task in tasks:
        task.result_path.unlink()
    (folder / _DESCRIPTION).unlink()
    notes = [*listing.notes, *(f"passed over: {count} {why}" for why, count in listing.passed.items())]
    summary = Summary(str(folder), {split: sum(each) for split, each in lengths.items()}, dropped, tuple(notes))
    first = (f"  {shown(name)}: {shown(reason)}" for name, reason in dropped[:5])
    log.show(str(summary), *first, *(f"  {shown(note)}" for note in notes))
    return summary


def _check_free(out: epath.Path, folder: epath.Path) -> None:
    """Raises a UserError where something else than an unfinished build is in the way."""
    is_free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if not is_free and ((folder / INFO).exists() or not (folder / _DESCRIPTION).exists()):
        raise UserError(f"data: {out} already exists; give another folder for the data set")


def _plan(listing: Listing, shard_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """What decides on the content of every shard."""
    digests = {split: items.digest() for split, items in listing.splits.items()}
    settings = {name: str(value) for name, value in options.items()}
    return {"items": digests, "shard_size": shard_size, "options": settings}


def _begin(out: epath.Path, folder: epath.Path, plan: dict[str, Any]) -> None:
    file = folder / _DESCRIPTION
    if not file.exists():
        write_whole(file, json.dumps(plan) + "\n")
        return
    try:
        before = parse_object(file.read_bytes())
    except ValueError:
        before = {}
    if before != plan:
        raise UserError(
            f"data: {out} has an unfinished build of other pictures, or with other settings; give "
            "another folder for the data set"
        )


def _remove(out: epath.Path) -> None:
    """Removes what this build has written, and nothing else."""
    shutil.rmtree(out / _NAME / _VERSION, ignore_errors=True)
    for folder in (out / _NAME, out):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _tasks(folder: epath.Path, split: str, items: Items, shard_size: int) -> list[Task]:
    firsts = range(0, len(items), shard_size)
    paths = shard_paths(folder, _NAME, split, len(firsts))
    parts = (items.part(first, min(first + shard_size, len(items))) for first in firsts)
    return [Task(path, split, part) for path, part in zip(paths, parts, strict=True)]


def _write_all(tasks: Sequence[Task], workers: int, what: str) -> None:
    for _ in tracked(_written(tasks, workers), what, sum(len(task.items) for task in tasks)):
        pass


def _written(tasks: Sequence[Task], workers: int) -> Iterator[int]:
    """Writes all shards; something for each item that is done with."""
    cores = os.cpu_count() or 1
    workers = min(workers or cores, len(tasks))
    if workers < 2:
        for task in tasks:
            yield from range(task.write(cores))
        return
    context = multiprocessing.get_context("spawn")  # the threads of grain and of Pillow do not survive a fork
    with ProcessPoolExecutor(workers, context, _end_with_parent) as pool:
        futures: list[Future[int]] = [pool.submit(Task.write, task, max(1, cores // workers)) for task in tasks]
        try:
            for future in as_completed(futures):
                yield from range(future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone, however that ended."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _check_dropped(dropped: Sequence[tuple[str, str]], total: int, max_dropped: float) -> None:
    faults = [each for each in dropped if not is_chosen(each[1])]
    if len(dropped) < total and len(faults) <= max_dropped * total:
        return
    dropped = faults if len(dropped) < total else dropped
    first = "; ".join(f"{shown(name)}: {shown(reason)}" for name, reason in dropped[:3])
    allowed = "none is left" if len(dropped) == total else f"more than --max_dropped={max_dropped} allows"
    raise UserError(
        f"data: {len(dropped)} of {total} pictures cannot be used, {allowed}: {reasons(dropped)}; first {first}"
    )


def _kept_repeats(runs: Sequence[tuple[int, int]], results: Sequence[Result]) -> list[tuple[int, int]]:
    """The runs of equal repeats among the items that are kept."""
    times = np.repeat([each for _, each in runs], [count for count, _ in runs])
    is_kept = np.ones(len(times), bool)
    first = 0
    for result in results:
        is_kept[[first + place for place in result.places]] = False
        first += result.kept + len(result.places)
    return [(len(list(same)), int(each)) for each, same in groupby(times[is_kept].tolist())]


def _sizes(splits: Mapping[str, Sequence[Result]]) -> bytes:
    """The content of `sizes.npz`."""
    buffer = io.BytesIO()
    sizes = {split: [size for result in each for size in result.sizes] for split, each in splits.items()}
    arrays: dict[str, Any] = {split: np.array(each, np.int32).reshape(-1, 2) for split, each in sizes.items()}
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def reasons(dropped: Sequence[tuple[str, str]]) -> str:
    """The commonest reasons with their numbers; what follows a colon is the single item's."""
    counts = Counter(reason.partition(":")[0] for _, reason in dropped)
    listed = ", ".join(f"{count} {shown(reason)}" for reason, count in counts.most_common(4))
    return listed + (", ..." if len(counts) > 4 else "")
