"""Shards of a TFDS data set in ArrayRecord, written one by one and in any order, and its metadata at the end.

Between the first shard and `dataset_info.json` a data set is unfinished, and no reader takes it for one.
"""

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from offsetjax.errors import Status, kind_of
from offsetjax.files import storage_error, write_whole
from offsetjax.leftovers import temporary_prefix

INFO = "dataset_info.json"
REPEATS_FILE = "repeats.json"  # of each split, runs of (number of records, how often each is seen in an epoch)
SIZES_FILE = "sizes.npz"  # of each split, width and height of its pictures, int32 [n, 2]
_ASKED_AT_ONCE = 32  # files of a bucket, for their sizes


def shard_paths(folder: epath.Path, name: str, split: str, count: int) -> list[epath.Path]:
    """The files of a split's shards, in their order."""
    template = _template(folder, name, split)
    return [epath.Path(template.sharded_filepath(shard_index=place, num_shards=count)) for place in range(count)]


def write_shard(
    path: epath.Path, features: tfds.features.FeaturesDict, records: Iterable[Mapping[str, Any]], options: str
) -> int:
    """Writes a shard; the file is there once it is whole.

    Args:
        options: ArrayRecord's, such as `group_size:1`.

    Returns:
        How many records it has.
    """
    serializer, count = ExampleSerializer(features.get_serialized_info()), 0
    with tempfile.TemporaryDirectory(prefix=temporary_prefix("shard")) as local:  # ArrayRecord writes to no bucket
        file = Path(local) / path.name
        with _as_storage_error(file), contextlib.closing(ArrayRecordWriter(str(file), options)) as writer:
            for record in records:
                writer.write(serializer.serialize_example(features.encode_example(record)))
                count += 1
        write_whole(path, file.read_bytes())
    return count


@contextlib.contextmanager
def _as_storage_error(file: Path) -> Iterator[None]:
    """Inside, ArrayRecord's error about a disk, which has no number, is one about storage, with the place."""
    try:
        yield
    except RuntimeError as error:
        if kind_of(error) != Status.STORAGE:
            raise
        raise storage_error(file.parent, error) from error


def write_info(
    folder: epath.Path,
    name: str,
    version: str,
    description: str,
    features: tfds.features.FeaturesDict,
    lengths: Mapping[str, Sequence[int]],
) -> None:
    """Writes TFDS's metadata, with which the data set is one.

    Args:
        lengths: of each split, the number of records in each shard.
    """
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version(version), data_dir=str(folder), module_name=__name__
    )
    info = tfds.core.DatasetInfo(builder=identity, description=description, features=features)
    info.set_file_format("array_record")
    splits = []
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        for split, each in lengths.items():
            paths = shard_paths(folder, name, split, len(each))
            num_bytes = sum(pool.map(lambda path: path.stat().length, paths))
            template = _template(folder, name, split)
            splits.append(tfds.core.SplitInfo(split, list(each), num_bytes, filename_template=template))
    info.set_splits(tfds.core.splits.SplitDict(splits))
    info.write_to_directory(folder)


def _template(folder: epath.Path, name: str, split: str) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(folder, dataset_name=name, split=split, filetype_suffix="array_record")
