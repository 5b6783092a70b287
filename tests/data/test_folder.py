"""One walk with one rule: what lies in a folder is read, dropped with a reason, or passed over and counted."""

import errno
import json
import os
import pathlib
import unicodedata
from collections.abc import Callable
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from offsetjax.data.captions import TextLines
from offsetjax.data.folder import list_folder
from offsetjax.data.items import Dropped, Listing, shown
from offsetjax.errors import TransientError, UserError
from offsetjax.storage import retry


def picture(file: pathlib.Path, caption: str | bytes | None = None, suffix: str = ".txt") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(file)
    if caption is not None:
        content = caption.encode() if isinstance(caption, str) else caption
        file.with_suffix(suffix).write_bytes(content)


def metadata(folder: pathlib.Path, *lines: dict | str | bytes) -> None:
    rows = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    content = b"\n".join(row.encode() if isinstance(row, str) else row for row in rows)
    (folder / "metadata.jsonl").write_bytes(content + b"\n")


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with one good picture."""
    picture(tmp_path / "pictures" / "a.png", "A")
    return tmp_path / "pictures"


def read(listing: Listing, split: str = "train") -> dict[str, tuple[str, ...] | str]:
    """The captions of each item, or why it is dropped."""
    found: dict[str, tuple[str, ...] | str] = {}
    for each in listing.splits[split]:
        try:
            found[each.name] = tuple(each.read().captions)
        except Dropped as reason:
            found[each.name] = str(reason)
    return found


@pytest.mark.parametrize("hidden", [".trash", ".ipynb_checkpoints", "__MACOSX", "@eaDir"])
def test_hidden_folders_are_passed_over_with_all_that_is_in_them(root: pathlib.Path, hidden: str) -> None:
    picture(root / hidden / "deep" / "b.png", "B")
    metadata(root / hidden, {"file_name": "deep/b.png", "text": "B"}, {"file_name": "../a.png", "text": "other"})
    listing = list_folder(root)
    assert read(listing) == {"a.png": ("A",)} and not listing.dropped
    assert listing.passed == {"hidden, or the system's own": 1}


def test_a_row_that_names_a_hidden_picture_is_told_so(root: pathlib.Path) -> None:
    picture(root / ".b.png")
    metadata(root, {"file_name": ".b.png", "text": "B"})
    assert "passed over as one of the hidden" in read(list_folder(root))[".b.png"]


def test_links_within_the_folder_are_read_and_others_are_counted(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    picture(tmp_path / "elsewhere" / "secret.png", "secret")
    (root / "linked.png").symlink_to("a.png")
    (root / "linked.txt").symlink_to("a.txt")
    (root / "out.png").symlink_to(tmp_path / "elsewhere" / "secret.png")
    (root / "folder").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    (root / "gone.png").symlink_to("nowhere.png")
    picture(root / "inner" / "b.png", "B")
    (root / "twice").symlink_to("inner")
    picture(root / "c.png")
    (root / "c.txt").symlink_to(tmp_path / "elsewhere" / "secret.txt")
    listing = list_folder(root)
    found = read(listing)
    assert {name: found[name] for name in found if name != "c.png"} == {
        "a.png": ("A",),
        "linked.png": ("A",),
        "inner/b.png": ("B",),
        "twice/b.png": ("B",),
    }
    assert "no caption" in found["c.png"] and "links that lead out" in found["c.png"]
    assert listing.passed["links that lead out (--follow_links reads them)"] == 3
    assert listing.passed["links to a folder that they are in"] == listing.passed["links to nothing"] == 1
    followed = read(list_folder(root, follow_links=True))
    assert followed["folder/secret.png"] == followed["c.png"] == ("secret",) and "out.png" in followed


def test_pipes_and_devices_are_never_opened(root: pathlib.Path) -> None:
    os.mkfifo(root / "pipe.png")
    picture(root / "b.png")
    os.mkfifo(root / "b.txt")
    (root / "zero.png").symlink_to("/dev/zero")
    picture(root / "c.png")
    (root / "c.txt").symlink_to("/dev/zero")
    for follow_links in (False, True):
        listing = list_folder(root, follow_links=follow_links)
        found = read(listing)
        assert found.pop("a.png") == ("A",) and found.keys() == {"b.png", "c.png"}
        assert all("no caption" in reason for reason in found.values())
        assert listing.passed["pipes, devices and sockets"] == (4 if follow_links else 2)


def test_folders_that_are_called_so_are_splits(root: pathlib.Path) -> None:
    (root / "a.png").rename(root.parent / "a.png")
    (root / "a.txt").unlink()
    for split in ("train", "val"):
        picture(root / split / "b.png")
        metadata(root / split, {"file_name": "b.png", "text": split})
    listing = list_folder(root)
    assert list(listing.splits) == ["train", "validation"]
    assert read(listing) == {"train/b.png": ("train",)}
    assert read(listing, "validation") == {"val/b.png": ("val",)}
    picture(root / "c.png", "C")
    mixed = list_folder(root)
    assert list(mixed.splits) == ["train"] and len(mixed.splits["train"]) == 3
    assert mixed.notes == ["train, val are no splits, as pictures lie beside them"]


def test_kohyas_folders_repeat_and_caption(root: pathlib.Path) -> None:
    for number in range(2):
        picture(root / "10_cat toy" / f"{number}.png", "its own" if number else None)
    picture(root / "2023_photos" / "b.png", "B")
    listing = list_folder(root)
    assert read(listing) == {
        "10_cat toy/0.png": ("cat toy",),
        "10_cat toy/1.png": ("its own",),
        "2023_photos/b.png": ("B",),
        "a.png": ("A",),
    }
    assert listing.repeats == {"train": [(2, 10), (2, 1)]}
    assert listing.notes == ["2 pictures of 10_cat toy are seen 10 times an epoch"]
    plain = list_folder(root, repeats=False)
    assert not plain.repeats and "no caption" in read(plain)["10_cat toy/0.png"]


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".caption", b"B"),
        (".TXT", b"\xef\xbb\xbfB\r\n"),
        (".json", b'{"caption": "B", "width": 4}'),
        (".json", b'{"prompt": "B"}'),
        (".json", b'{"caption": "B", "similarity": NaN}'),
        (".png.txt", b"B"),
    ],
)
def test_captions_beside_a_picture_are_read_where_they_are_usual(
    root: pathlib.Path, suffix: str, content: bytes
) -> None:
    picture(root / "b.png", content, suffix)
    assert read(list_folder(root))["b.png"] == ("B",)


@pytest.mark.parametrize(("lines", "expected"), [("whole", ("B\nC",)), ("first", ("B",)), ("each", ("B", "C"))])
def test_a_text_of_several_lines_is_what_is_asked_for(
    root: pathlib.Path, lines: TextLines, expected: tuple[str, ...]
) -> None:
    picture(root / "b.png", "B\r\nC\n")
    assert read(list_folder(root, lines=lines))["b.png"] == expected


def test_metadata_of_other_forms(root: pathlib.Path) -> None:
    for name in ("b", "c", "d", "e", "f"):
        picture(root / "sub" / f"{name}.png")
    rows = 'file_name,prompt\nsub/b.png,"B, with ""quotes""\nand a line"\nsub/c.png,C\n'
    (root / "metadata.csv").write_text(rows)
    metadata(
        root,
        {"file_name": "sub\\d.png", "prompt": "D"},
        {"file_name": str(root / "sub" / "e.png"), "text": "E"},
        {"file_name": "sub/f.png", "captions": ["F", "", "G"]},
    )
    assert {name: captions for name, captions in read(list_folder(root)).items() if name != "a.png"} == {
        "sub/b.png": ('B, with "quotes"\nand a line',),
        "sub/c.png": ("C",),
        "sub/d.png": ("D",),
        "sub/e.png": ("E",),
        "sub/f.png": ("F", "G"),
    }


@pytest.mark.parametrize(
    "table",
    [
        ("metadata.csv", b"image,caption,ignored\nsub/b.png,B,1\nsub/b.png,C,2\nsub/b.png,B,3\n"),
        ("metadata.tsv", b"file_name\ttext\nsub/b.png\tB\nsub/b.png\tC\n"),
        ("metadata.json", b'[{"file_name": "sub/b.png", "captions": ["B", "C"]}]'),
        ("metadata.json", b'{"sub/b.png": {"captions": ["B", "C"]}}'),
        ("metadata.jsonl", b'{"path": "sub/b", "text": ["B", "C"]}'),
        ("metadata.parquet", [{"file_name": "sub/b.png", "text": "B"}, {"file_name": "sub/b.png", "text": "C"}]),
        ("metadata.parquet", [{"filename": "sub/b.png", "captions": ["B", "C"], "score": 0.5}]),
    ],
)
def test_tables_of_every_kind_and_several_captions(root: pathlib.Path, table: tuple[str, Any]) -> None:
    picture(root / "sub" / "b.png", "beside it, and not read")
    name, content = table
    if isinstance(content, bytes):
        (root / name).write_bytes(content)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), root / name)
    listing = list_folder(root)
    assert read(listing) == {"a.png": ("A",), "sub/b.png": ("B", "C")} and not listing.dropped


def test_kohyas_table_joins_captions_and_tags_and_names_without_suffixes(root: pathlib.Path) -> None:
    for name in ("b", "c", "d"):
        picture(root / "10_cat" / f"{name}.png")
    rows = {
        str(root / "10_cat" / "b"): {"caption": "a cat", "tags": "outdoors, sun", "train_resolution": [512, 512]},
        "10_cat/c.png": {"tags": "indoors"},
        "10_cat/d": {"train_resolution": [512, 512]},
    }
    (root / "meta_lat.json").write_text(json.dumps(rows))
    found = read(list_folder(root))
    assert found["10_cat/b.png"] == ("a cat, outdoors, sun",) and found["10_cat/c.png"] == ("indoors",)
    assert found["10_cat/d.png"] == "empty caption"


def test_a_class_is_a_caption_by_a_template(root: pathlib.Path) -> None:
    picture(root / "data" / "train" / "tabby_cat" / "b.png")
    picture(root / "data" / "test" / "dog" / "c.png")
    (root / "a.png").unlink()
    listing = list_folder(root, label_template="a photo of a {label}")
    assert read(listing) == {"data/train/tabby_cat/b.png": ("a photo of a tabby cat",)}
    assert read(listing, "test") == {"data/test/dog/c.png": ("a photo of a dog",)}
    assert "no caption" in read(list_folder(root))["data/train/tabby_cat/b.png"]


def test_a_line_ends_where_it_does_and_names_are_compared_normalised(root: pathlib.Path) -> None:
    composed, apart = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    picture(root / apart)
    metadata(root, '{"file_name": "a.png", "text": "one\u2028line\x85"}\r', {"file_name": composed, "text": "É"})
    assert read(list_folder(root)) == {"a.png": ("one\u2028line",), apart: ("É",)}


@pytest.mark.parametrize(
    ("spoil", "name", "reason"),
    [
        (lambda root: picture(root / "b.png", b"caf\xe9"), "b.png", "the caption's file is not UTF-8 text"),
        (lambda root: picture(root / "b.png", "x" * 70_000), "b.png", "the caption's file is longer than 65536 bytes"),
        (lambda root: picture(root / "b.png", "[" * 9000, ".json"), "b.png", "not a JSON object: nested too deep"),
        (lambda root: picture(root / "b.png", "[1]", ".json"), "b.png", "a list, not an object"),
        (lambda root: picture(root / "b.png", '{"text": 3}', ".json"), "b.png", "the caption is no text: '3'"),
        (lambda root: picture(root / "b.png", " \n"), "b.png", "empty caption"),
        (lambda root: picture(root / os.fsdecode(b"caf\xe9.png"), "B"), "caf\\udce9.png", "its name is not UTF-8"),
        (
            lambda root: metadata(root, '{"file_name": "a.png", "text": "half \\ud83d"}'),
            "metadata.jsonl:1",
            "the caption cannot be written: it has half of a surrogate pair",
        ),
        (lambda root: metadata(root, "[" * 200_000), "metadata.jsonl:1", "nested too deep"),
        (lambda root: metadata(root, "", b"\xff\xfe", "{}"), "metadata.jsonl:2", "not UTF-8 text"),
        (lambda root: metadata(root, "{oops"), "metadata.jsonl:1", "not a JSON object on one line"),
        (lambda root: (root / "metadata.json").write_text("[" * 9000), "metadata.json", "not JSON: nested too deep"),
        (lambda root: (root / "metadata.json").write_text('{"name": "my set"}'), "metadata.json", "neither a list of"),
        (lambda root: (root / "metadata.json").write_text('["a.png"]'), "metadata.json:1", "a row is an object"),
        (lambda root: (root / "metadata.parquet").write_bytes(b"PAR1"), "metadata.parquet:1", "not a table in Parquet"),
        (
            lambda root: pyarrow.parquet.write_table(pyarrow.table({"url": ["a.png"]}), root / "metadata.parquet"),
            "metadata.parquet:1",
            "no file_name",
        ),
        (lambda root: metadata(root, '["a.png"]'), "metadata.jsonl:1", "a list, not an object"),
        (lambda root: metadata(root, {"text": "a"}), "metadata.jsonl:1", "no file_name"),
        (lambda root: metadata(root, {"file_name": "a.png", "text": 3}), "metadata.jsonl:1", "no text: '3'"),
        (lambda root: metadata(root, {"file_name": 3}), "metadata.jsonl:1", "no file_name"),
        (
            lambda root: metadata(root, {"file_name": "a.png", "text": "x" * 2**21}, {"file_name": "b.png"}),
            "metadata.jsonl:1",
            "a line longer than 1048576 bytes",
        ),
        (lambda root: (root / "metadata.csv").write_bytes(b"file_name,text\na.png,caf\xe9\n"), "metadata.csv:2", "UTF"),
        (
            lambda root: [
                metadata(root, {"file_name": "a.png", "text": "x"}),
                (root / "metadata.csv").write_text("file_name,text\na.png,y\n"),
            ],
            "a.png",
            "several captions: the second in metadata.jsonl:1",
        ),
        *[
            (
                lambda root, name=name: metadata(root, {"file_name": name, "text": "a"}),
                "metadata.jsonl:1",
                "leads out of the folder",
            )
            for name in (
                "../x.png",
                "/etc/x.png",
                "below/../../x.png",
                "C:\\x.png",
                "..\\x.png",
                "\\\\host\\x.png",
                ".",
            )
        ],
    ],
)
def test_one_that_is_spoilt_is_dropped_by_name_and_the_others_are_kept(
    root: pathlib.Path, spoil: Callable[[pathlib.Path], object], name: str, reason: str
) -> None:
    picture(root / "whole.png", "whole")
    spoil(root)
    listing = list_folder(root)
    found = read(listing) | dict(listing.dropped)
    assert reason in found[name] and "\n" not in found[name]
    assert found["whole.png"] == ("whole",)


@pytest.mark.parametrize("name", ["read_bytes", "open", "stat"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENODEV])
def test_a_lost_mount_is_waited_for_and_drops_no_picture(
    root: pathlib.Path, name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "WAITS", (0.0, 0.0))
    (root / "b.txt").write_text("B")
    picture(root / "b.png")
    listing, act, failures = list_folder(root), getattr(pathlib.Path, name), [number] * 2

    def failing(path: pathlib.Path, *arguments: Any, **options: Any) -> Any:
        if failures and path.suffix in (".png", ".txt"):
            raise OSError(failures.pop(), os.strerror(number), str(path))
        return act(path, *arguments, **options)

    monkeypatch.setattr(pathlib.Path, name, failing)
    assert read(listing) == {"a.png": ("A",), "b.png": ("B",)}
    failures += [number] * 99
    with pytest.raises(TransientError, match=r"\.(png|txt): .*; tried 3 times in 0 s; it may pass by itself"):
        read(listing)


@pytest.mark.parametrize("times", [2, 3])
def test_a_folder_that_cannot_be_listed_for_a_moment_is_listed_whole(
    root: pathlib.Path, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "WAITS", (0.0, 0.0))
    picture(root / "below" / "b.png", "B")
    scandir, failures = os.scandir, [1] * times

    def failing(path: Any) -> Any:
        if str(path).endswith("below") and failures:
            failures.pop()
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    if times < 3:
        assert read(list_folder(root)) == {"a.png": ("A",), "below/b.png": ("B",)}
    else:
        with pytest.raises(TransientError, match=r"below: .*; tried 3 times"):
            list_folder(root)


def test_what_was_found_beside_is_named(root: pathlib.Path) -> None:
    (root / "notes.md").write_text("notes")
    (root / "b.psd").write_bytes(b"")
    (root / "captions.csv").write_text("a.png,A")
    assert list_folder(root).passed == {
        "files that are neither pictures nor read as captions": 2,
        "tables that are not called metadata (rename them, if captions are in them)": 1,
    }
    (root / "a.png").unlink()
    os.mkfifo(root / "b.png")
    with pytest.raises(UserError, match=r"holds no pictures .*; passed over: 1 pipes, devices and sockets"):
        list_folder(root)


def test_what_is_shown_steers_no_terminal() -> None:
    assert shown("a\x1b]0;title\x07\nb\ud83d é\u202e") == "a\\x1b]0;title\\x07\\nb\\ud83d é\\u202e"
