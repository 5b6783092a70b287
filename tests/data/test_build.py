"""A folder of pictures becomes a data set that another reader reads back, or the user is told why not."""

import io
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from offsetjax.data.build import Task, build
from offsetjax.data.inspect import inspect
from offsetjax.data.source import captions, open_source
from offsetjax.errors import UserError


def picture(seed: int, height: int = 12, width: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def write(folder: pathlib.Path, name: str, caption: str | None, seed: int = 0) -> None:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(file)
    if caption is not None:
        file.with_suffix(".txt").write_text(caption, encoding="utf-8")


def write_metadata(folder: pathlib.Path, *lines: dict | str) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Twenty captioned pictures, two of them in a folder below."""
    root = tmp_path / "pictures"
    for number in range(20):
        write(root, f"{'below/' if number > 17 else ''}{number:02}.png", f"Picture {number} — ö.\n", number)
    return root


def test_pictures_and_captions_come_back_in_order(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    summary = build(folder, tmp_path / "set")
    assert (summary.kept, summary.dropped) == (20, ())
    records = list(tfds.builder_from_directory(summary.path).as_data_source("train"))  # TFDS's own reader and decoder
    names = [record["name"].decode() for record in records]
    assert names == [f"{number:02}.png" for number in range(18)] + ["below/18.png", "below/19.png"]
    for number, record in enumerate(records):
        assert record["caption"].decode() == f"Picture {number} — ö."
        assert (record["height"], record["width"]) == (12, 16)
        np.testing.assert_array_equal(record["image"], np.asarray(picture(number)))
    assert open_source(tmp_path / "set")[3].image == (folder / "03.png").read_bytes()
    assert captions(open_source(summary.path))[3] == "Picture 3 — ö."


def test_metadata_captions_by_either_name_also_in_folders_below(tmp_path: pathlib.Path) -> None:
    root = tmp_path / "pictures"
    for name in ("a.png", "b.png", "below/c.png", "d.png"):
        write(root, name, "from the text file")
    write_metadata(root, {"file_name": "a.png", "text": "A"}, "", {"file_name": "./b.png", "caption": "B", "more": 1})
    write_metadata(root / "below", {"file_name": "c.png", "text": "C"})
    build(root, tmp_path / "set")
    assert captions(open_source(tmp_path / "set")) == ["A", "B", "C", "from the text file"]


def test_every_reason_to_drop_is_counted_stored_and_printed(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (folder / "00.png").read_bytes()
    write(folder, "x_none.png", None)
    write(folder, "x_blank.png", "  \n")
    for name, data in {"empty.png": b"", "cut.png": whole[:-400], "page.jpg": b"<html>"}.items():
        (folder / f"x_{name}").write_bytes(data)
        (folder / f"x_{name}").with_suffix(".txt").write_text("A picture.")
    write_metadata(folder, {"file_name": "x_lost.png", "text": "It is gone."})
    (folder / ".hidden.png").write_bytes(b"not counted")
    summary = build(folder, tmp_path / "set", max_dropped=0.5)
    reasons = {
        "x_none.png": "no caption",
        "x_blank.png": "empty caption",
        "x_empty.png": "the file is empty",
        "x_cut.png": "truncated",
        "x_page.jpg": "not a picture",
        "x_lost.png": "missing",
    }
    stored = json.loads((pathlib.Path(summary.path) / "dropped.json").read_text())
    assert summary.kept == 20 and dict(summary.dropped) == stored and stored.keys() == reasons.keys()
    assert all(reason in stored[name] for name, reason in reasons.items())
    lines = capsys.readouterr().out.splitlines()
    assert "20 pictures, 6 dropped" in lines[0] and len(lines) == 7 and "x_blank.png: empty caption" in lines[1]
    assert lines[6] == "  passed over: 1 hidden, or the system's own"
    assert len(open_source(tmp_path / "set")) == 20


def test_messy_pictures_are_stored_so_that_any_decoder_shows_them(tmp_path: pathlib.Path) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0).save(root / "turned.jpg", exif=exif)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(root / "clear.png")
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(root / "inks.jpg")
    Image.fromarray(np.full((4, 4), 65535, np.uint16)).save(root / "deep.png")
    picture(1).save(root / "plain.bmp")
    for file in list(root.iterdir()):
        file.with_suffix(".txt").write_text(file.stem)
    assert build(root, tmp_path / "set").kept == 5
    source = open_source(tmp_path / "set")
    shown = {source[i].caption: Image.open(io.BytesIO(source[i].image)) for i in range(5)}
    assert {image.mode for image in shown.values()} == {"RGB"} and shown["turned"].size == (12, 16)
    colours = {name: np.asarray(image).reshape(-1, 3).mean(axis=0) for name, image in shown.items()}
    np.testing.assert_allclose(colours["clear"], 255)
    np.testing.assert_allclose(colours["deep"], 255)
    np.testing.assert_allclose(colours["inks"], (255, 0, 0), atol=4)
    np.testing.assert_array_equal(np.asarray(shown["plain"]), np.asarray(picture(1)))


def test_two_builds_are_the_same_files(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    made = [pathlib.Path(build(folder, tmp_path / name).path) for name in ("one", "two")]
    first, second = ({file.name: file.read_bytes() for file in path.iterdir()} for path in made)
    assert first == second and len(first) == 5


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: [file.unlink() for file in root.rglob("*.txt")], "20 of 20 .* none is left: 20 no caption"),
        (lambda root: [file.write_bytes(b"x") for file in root.rglob("*.png")], "20 of 20 .* first 00.png: not a pict"),
        (lambda root: [(root / f"0{i}.png").write_bytes(b"") for i in range(3)], "3 of 20 .* --max_dropped=0.1 allows"),
        (lambda root: [file.unlink() for file in root.rglob("*.png")], "holds no pictures"),
    ],
)
def test_what_cannot_be_built_is_refused_and_leaves_nothing(
    spoil: Callable[[pathlib.Path], object], message: str, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    spoil(folder)
    with pytest.raises(UserError, match=message) as raised:
        build(folder, tmp_path / "set")
    assert "\n" not in str(raised.value)
    assert [file.name for file in tmp_path.iterdir()] == ["pictures"]


def test_folders_that_are_missing_or_in_use_are_refused(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        build(tmp_path / "nowhere", tmp_path / "set")
    (tmp_path / "set").mkdir()
    build(folder, tmp_path / "set")  # an empty folder may be there
    before = sorted((tmp_path / "set").rglob("*"))
    with pytest.raises(UserError, match="already exists"):
        build(folder, tmp_path / "set")
    assert sorted((tmp_path / "set").rglob("*")) == before
    with pytest.raises(UserError, match="max_dropped"):
        build(folder, tmp_path / "other", max_dropped=10)


def test_a_tenth_may_be_dropped_and_no_more(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for number in range(2):
        (folder / f"0{number}.png").write_bytes(b"")
    assert build(folder, tmp_path / "set").kept == 18
    with pytest.raises(UserError, match="2 of 20"):
        build(folder, tmp_path / "strict", max_dropped=0.09)


def test_inspect_prints_what_is_there(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    for number, level in enumerate([0, 0, 0, 255]):
        Image.new("RGB", (30, 20 + number), (level,) * 3).save(root / f"{number}.png")
        (root / f"{number}.txt").write_text("Dark." if level == 0 else "Bright.")
    (root / "4.png").write_bytes(b"")
    (root / "4.txt").write_text("Nothing.")
    build(root, tmp_path / "set", max_dropped=0.2)
    capsys.readouterr()
    inspect(tmp_path / "set", tmp_path / "sheet.png")
    text = capsys.readouterr().out
    assert "4 pictures" in text and "shorter side: 20 to 23" in text and "4 distinct sizes" in text
    assert "mean 0.250, standard deviation 0.433" in text
    bins = [int(line.split()[1]) for line in text.splitlines() if line.startswith("  0.")]
    assert bins == [3, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert "captions: 2 distinct" in text and text.index("3 x Dark.") < text.index("1 x Bright.")
    assert "dropped when it was built: 1: 1 the file is empty" in text
    next((tmp_path / "set").rglob("dropped.json")).write_text("{")
    inspect(tmp_path / "set")
    assert "dropped when it was built: not known, for " in capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert (sheet == 0).all(axis=-1).sum() >= 3 * 160 * 160, "three black pictures are on the sheet"


def test_tensorflow_is_never_imported(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    program = """
import sys
import numpy as np
from offsetjax.data.build import Task, build
from offsetjax.data.inspect import inspect
from offsetjax.data.source import open_source
from offsetjax.data.stream import make_stream
build(sys.argv[1], sys.argv[2])
inspect(sys.argv[2])
stream = make_stream(open_source(sys.argv[2]), seed=0, global_batch_size=2, resolution=8, random_flip=True,
                     tokenize=lambda caption: ({"text": np.zeros(3, np.int32)}, 3, 3))
batches = stream.iterator(0)
next(batches)
batches.close()
print("tensorflow" in sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", program, folder, tmp_path / "set"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "False"
    assert done.stderr == "", "warnings, or a progress bar where there is no terminal"


def test_a_build_that_was_interrupted_continues_with_the_shards_that_are_missing(
    folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, "x.png", None)
    whole = pathlib.Path(build(folder, tmp_path / "whole", shard_size=6, workers=1).path)
    wrote, write_one = [], Task.write

    def interrupted(task: Task, threads: int) -> int:
        if len(wrote) == 2:
            raise KeyboardInterrupt
        wrote.append(task.path.name)
        return write_one(task, threads)

    with monkeypatch.context() as patch:
        patch.setattr(Task, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(folder, tmp_path / "set", shard_size=6, workers=1)
    with pytest.raises(UserError, match="holds no data set"):
        open_source(tmp_path / "set")
    with pytest.raises(UserError, match="has an unfinished build of other pictures, or with other settings"):
        build(folder, tmp_path / "set", shard_size=5, workers=1)
    wrote.clear()
    note = next((tmp_path / "set").rglob(".*.json"))  # as an older version has it
    note.write_text(
        json.dumps({name: value for name, value in json.loads(note.read_text()).items() if name != "sizes"})
    )
    summary = build(folder, tmp_path / "set", shard_size=6, workers=2)
    assert summary.kept == 20 and [name for name, _ in summary.dropped] == ["x.png"]
    # Processes write the fields of a record in another order each.
    assert {file.name for file in whole.iterdir()} == {file.name for file in pathlib.Path(summary.path).iterdir()}
    one, other = (open_source(tmp_path / name) for name in ("whole", "set"))
    assert [one[index] for index in range(20)] == [other[index] for index in range(20)]
    assert len(open_source(tmp_path / "set")) == 20


def test_splits_and_repeats_are_written(tmp_path: pathlib.Path) -> None:
    for name in ("train/5_cat/a.png", "train/5_cat/b.png", "train/c.png", "test/d.png"):
        write(tmp_path / "pictures", name, name)
    (tmp_path / "pictures" / "train" / "5_cat" / "a.png").write_bytes(b"broken")
    summary = build(tmp_path / "pictures", tmp_path / "set", max_dropped=0.5)
    assert summary.splits == {"train": 2, "test": 1} and "3 pictures (2 of train, 1 of test)" in str(summary)
    assert captions(open_source(tmp_path / "set", "test")) == ["test/d.png"]
    assert json.loads((pathlib.Path(summary.path) / "repeats.json").read_text()) == {"train": [[1, 5], [1, 1]]}
    seen = ["train/5_cat/b.png"] * 5 + ["train/c.png"]
    assert (
        captions(open_source(tmp_path / "set")) == seen
        and captions(open_source(tmp_path / "set", "train[1:]")) == seen[5:]
    )
    assert captions(open_source(tmp_path / "set", "train[:1]+test")) == [*seen[:5], "test/d.png"]
