"""What a build leaves out by choice is counted and named, and is not held against `--max_dropped`."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from offsetjax.cli import main
from offsetjax.data.build import Task, build
from offsetjax.data.cleaning import Cleaning
from offsetjax.data.source import captions, open_source
from offsetjax.errors import UserError


def picture(seed: int, width: int = 16, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A good picture, and one of each kind that may be left out."""
    root = tmp_path / "pictures"
    root.mkdir()
    picture(0).save(root / "a.png")
    picture(0).save(root / "b.bmp")  # the same pixels in another file
    picture(1, 15, 40).save(root / "c.png")
    picture(2, 100, 20).save(root / "d.png")
    frames = [picture(seed) for seed in (3, 4)]
    frames[0].save(root / "e.gif", save_all=True, append_images=frames[1:])
    frames[0].save(root / "f.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(root / "g.tif", save_all=True, append_images=frames[1:])
    picture(0).save(root / "h.png", compress_level=0)
    picture(5).save(root / "i.png")
    for file in list(root.iterdir()):
        file.with_suffix(".txt").write_text(file.stem)
    return root


def test_each_reason_is_counted_and_named(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choice = ["--min_side=16", "--max_aspect=4", "--drop_animated", "--drop_duplicates"]
    arguments = ["data", "build", f"--images={folder}", f"--out={tmp_path / 'set'}", "--max_dropped=0", *choice]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "3 pictures, 6 dropped" in printed
    for counted in ("2 there twice", "1 too small", "1 too long", "2 animated"):
        assert counted in printed
    assert json.loads(next((tmp_path / "set").rglob("dropped.json")).read_text()) == {
        "b.bmp": "there twice: it has the pixels of a.png",
        "c.png": "too small: 15x40 has a side below --min_side=16",
        "d.png": "too long: 100x20 is beyond --max_aspect=4",
        "e.gif": "animated: it has 2 frames",
        "f.webp": "animated: it has 2 frames",
        "h.png": "there twice: it has the pixels of a.png",
    }
    source = open_source(tmp_path / "set")
    assert captions(source) == ["a", "g", "i"] and source.sizes().tolist() == [[16, 16]] * 3  # type: ignore[attr-defined]


def test_by_default_all_are_taken(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert build(folder, tmp_path / "set").kept == 9


def test_faults_are_limited_and_choices_are_not(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (folder / "i.png").write_bytes(b"broken")
    with pytest.raises(
        UserError, match=r"1 of 9 pictures cannot be used, more than --max_dropped=0.1 allows: 1 not a p"
    ):
        build(folder, tmp_path / "set", cleaning=Cleaning(max_aspect=1.5))
    with pytest.raises(UserError, match=r"9 of 9 .* none is left: 8 too small, 1 not a picture"):
        build(folder, tmp_path / "set", cleaning=Cleaning(min_side=999))
    for wrong in ({"min_side": -1}, {"max_aspect": 0.5}, {"max_aspect": float("nan")}, {"max_aspect": float("inf")}):
        with pytest.raises(UserError, match=r"data: --(min_side|max_aspect)=.* must be at least"):
            Cleaning(**wrong)  # type: ignore[arg-type]


def test_duplicates_over_shards_are_left_out_also_after_a_kill(
    folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, count = Task.write, 0
    cleaning = Cleaning(drop_duplicates=True)
    options: dict[str, Any] = {"workers": 1, "shard_size": 2, "cleaning": cleaning}
    whole = build(folder, tmp_path / "whole", **options)
    assert whole.kept == 5 and captions(open_source(tmp_path / "whole")) == list("acdei")

    def killed(task: Task, threads: int) -> int:
        nonlocal count
        if task.left_out and count:
            write(task, threads)
            task.result_path.unlink()  # between the shard and what is said of it
            raise KeyboardInterrupt
        count += bool(task.left_out)
        return write(task, threads)

    monkeypatch.setattr(Task, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        build(folder, tmp_path / "set", **options)
    monkeypatch.setattr(Task, "write", write)
    again = build(folder, tmp_path / "set", **options)
    assert (again.splits, again.dropped) == (whole.splits, whole.dropped)
    one, other = (pathlib.Path(each.path) for each in (whole, again))
    assert {file.name: file.read_bytes() for file in one.iterdir()} == {
        file.name: file.read_bytes() for file in other.iterdir()
    }
