"""Tars and tables give the pictures and captions that a folder of the same gives; what is odd in them is told."""

import json
import os
import pathlib
import pickle
import tarfile
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from offsetjax.cli import main
from offsetjax.data.archives import READERS, Archive, Reader
from offsetjax.data.build import Task, build
from offsetjax.data.items import Dropped, Item, Listing, Named
from offsetjax.data.places import list_pictures
from offsetjax.data.source import captions, open_source
from offsetjax.errors import UserError
from offsetjax.prepare.stamps import INSTALLED, find_stamps
from tests.data.packed import Pictures, as_datasets, as_img2dataset, drawn, members, write_table, write_tar
from tests.launch.fake_bucket import BUCKET, bucket, run_on


def read(listing: Listing, split: str = "train") -> dict[str, tuple[bytes, tuple[str, ...]] | str]:
    """The content and the captions of each item, or why it is dropped."""
    found: dict[str, Any] = {}
    for each in listing.splits[split]:
        try:
            item = each.read()
            found[each.name] = (item.image, tuple(item.captions))
        except Dropped as reason:
            found[each.name] = str(reason)
    assert len(found) == len(listing.splits[split])
    return found


def expected(pictures: Pictures) -> list[tuple[bytes, tuple[str, ...]]]:
    return [(image, (caption,)) for image, caption in pictures.values()]


@pytest.fixture(scope="module")
def stamps() -> Pictures:
    """Twelve of Tux Paint's."""
    if not pathlib.Path(INSTALLED).exists() and not os.environ.get("CI"):
        pytest.skip("apt-get install tuxpaint-stamps-default")
    found = find_stamps(pathlib.Path(INSTALLED))[:: 538 // 12][:12]
    return {f"{number:05}.png": (file.read_bytes(), caption) for number, (file, caption) in enumerate(found)}


@pytest.mark.parametrize("kind", ["webdataset", "img2dataset", "datasets", "img2dataset_parquet", "large"])
def test_real_pictures_come_out_of_every_format_as_they_went_in(
    kind: str, stamps: Pictures, tmp_path: pathlib.Path
) -> None:
    if kind in ("webdataset", "img2dataset"):
        place = write_tar(tmp_path / "0.tar", members(stamps, ".txt" if kind == "webdataset" else ".json"))
    elif kind == "large":
        structs = pa.array(as_datasets(stamps)["image"], pa.struct({"bytes": pa.large_binary(), "path": pa.string()}))
        texts = pa.array([[caption] for _, caption in stamps.values()], pa.large_list(pa.large_string()))
        place = write_table(tmp_path / "0.parquet", pa.table({"picture": structs, "Captions": texts}), row_group_size=5)
    else:
        columns = as_datasets(stamps) if kind == "datasets" else as_img2dataset(stamps)
        place = write_table(tmp_path / "0.parquet", columns, row_group_size=5)
    found = list(read(list_pictures(place)).values())
    if kind == "img2dataset_parquet":
        assert found.pop() == "was not downloaded: failed_to_download"
    assert found == expected(stamps)


def test_a_build_of_several_files_has_their_splits_and_resumes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        split = "test" if number == 2 else "train"
        write_tar(tmp_path / "in" / f"{split}-{number:05}.tar", members(drawn(5, 5 * number)))
    place, write = str(tmp_path / "in" / "t*.tar"), Task.write
    written: list[str] = []

    def interrupted(task: Task, threads: int) -> int:
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(task.path.name)
        return write(task, threads)

    monkeypatch.setattr(Task, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(place, tmp_path / "set", workers=1, shard_size=4)
    monkeypatch.setattr(Task, "write", lambda task, threads: written.append(task.path.name) or write(task, threads))
    summary = build(place, tmp_path / "set", workers=1, shard_size=4)
    assert summary.splits == {"train": 10, "test": 5} and len(written) == len(set(written)) == 5
    assert captions(open_source(tmp_path / "set")) == [f"picture {number} — ö" for number in range(10)]
    assert open_source(tmp_path / "set", "test")[4].name == "test-00002.tar/000014.png"
    assert open_source(tmp_path / "set", "train")[6].image == drawn(1, 6)["000006.png"][0]


def test_an_archive_that_changed_since_is_another_build(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = write_table(tmp_path / "a.parquet", as_datasets(drawn(5)))

    def killed(task: Task, threads: int) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Task, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            build(place, tmp_path / "set", workers=1)
    write_table(place, as_datasets(drawn(6)))
    with pytest.raises(UserError, match="unfinished build of other pictures"):
        build(place, tmp_path / "set", workers=1)


def test_parts_are_those_of_the_whole(tmp_path: pathlib.Path) -> None:
    for number in range(3):
        write_table(tmp_path / f"{number}.parquet", as_datasets(drawn(7, 7 * number)), row_group_size=3)
    items = list_pictures(tmp_path).splits["train"]
    names = [each.name for each in items]
    assert len(items) == 21 and names[7] == "1.parquet:1"
    for first, last in ((0, 21), (0, 1), (5, 16), (6, 7), (7, 14), (20, 21)):
        part = items.part(first, last)
        assert [each.name for each in part] == names[first:last] and len(part) == last - first
        assert [each.name for each in part.part(0, 1)] == names[first : first + 1]


def test_members_of_a_tar_may_come_in_any_order_and_be_more(tmp_path: pathlib.Path) -> None:
    pictures = drawn(3)
    content = dict(reversed(members(pictures).items())) | {
        "000000.mask.png": b"x",
        "sub.dir/IMG.1.JPG": b"one",
        "sub.dir/IMG.1.TXT": b"One\r\n",
        "./b.webp": b"two",
        "b.caption": b"Two",
        "readme.md": b"",
        "._000000.png": b"",
        "metadata.jsonl": b"{}",
        "both.png": b"",
        "both.jpg": b"",
        "alone.png": b"three",
    }
    listing = list_pictures(write_tar(tmp_path / "a.tar", content))
    found = read(listing)
    assert found["a.tar/sub.dir/IMG.1.JPG"] == (b"one", ("One",)) and found["a.tar/b.webp"] == (b"two", ("Two",))
    assert [found[f"a.tar/{name}"] for name in pictures] == expected(pictures) and len(found) == 6
    assert str(found["a.tar/alone.png"]).startswith("no caption: ")
    assert [reason for _, reason in listing.dropped] == ["several pictures of one name: .png .jpg"]
    assert listing.passed == {
        "hidden, or the system's own": 1,
        "members of tars that belong to no picture": 1,
        "metadata files in tars (unpack them, and give the folder)": 1,
    }


def test_names_links_and_devices_of_a_stranger_are_not_followed(tmp_path: pathlib.Path) -> None:
    def info(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
        made = tarfile.TarInfo(name)
        made.type, made.linkname = kind, target
        return made

    content = {
        f"{name}{suffix}": b"x" for name in ("../up", "/etc/root", "a/../../b", "c\\d") for suffix in (".png", ".txt")
    }
    links = (
        info("link.png", tarfile.SYMTYPE, "/etc/passwd"),
        info("hard.png", tarfile.LNKTYPE, "000000.png"),
        info("zero.png", tarfile.CHRTYPE),
        info("pipe.png", tarfile.FIFOTYPE),
        info("folder", tarfile.DIRTYPE),
    )
    listing = list_pictures(write_tar(tmp_path / "a.tar", {**content, **members(drawn(1))}, *links))
    assert list(read(listing).values()) == expected(drawn(1))
    assert len(listing.dropped) == 8 and all("leads out of the tar" in reason for _, reason in listing.dropped)
    assert listing.passed == {"links, devices and sparse members of tars": 4}
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar"]


def _headers(kind: bytes, size: int, count: int = 1) -> bytes:
    made = tarfile.TarInfo("x")
    made.type, made.size = kind, size
    return made.tobuf(tarfile.GNU_FORMAT) * count


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda tar: tar[: len(tar) // 2], "it ends in|not a tar, or cut|no end"),
        (lambda tar: tar[:1024], "it has no end: it was cut after 1024 bytes"),
        (lambda tar: b"", "not a tar, or cut: empty file"),
        (lambda tar: b"\x1f\x8b" + tar, "not a tar, or cut"),
        (lambda tar: b"<html>" * 1000, "not a tar, or cut"),
        (lambda tar: tar[:1024] + b"?" * 512 + tar[1536:], "no header|not a tar"),
        (lambda tar: tar + tar + bytes(2**20), "bytes behind its end, such as another tar"),
        (lambda tar: _headers(tarfile.XHDTYPE, 2**33) + tar, "a header of "),
        (lambda tar: _headers(tarfile.GNUTYPE_LONGNAME, 2**33) + tar, "a header of "),
        (lambda tar: _headers(tarfile.REGTYPE, -1024) + tar, "is none|a header of|not a tar"),
        (lambda tar: _headers(tarfile.XHDTYPE, -1024) + tar, "is none|a header of|not a tar"),
        (lambda tar: _headers(tarfile.XHDTYPE, 512, 3000) + tar, "not a tar, or cut"),
        (lambda tar: _headers(tarfile.REGTYPE, 2**40), "it ends in 'x'"),
    ],
)
def test_a_tar_that_is_damaged_is_refused_in_a_line(
    spoil: Callable[[bytes], bytes], reason: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = write_tar(tmp_path / "in" / "a.tar", members(drawn(4)))
    write_tar(tmp_path / "in" / "b.tar", members(drawn(30, 4)))
    tar.write_bytes(spoil(tar.read_bytes()))
    arguments = ["data", "build", f"--images={tmp_path / 'in'}", f"--out={tmp_path / 'out'}", "--workers=1"]
    assert main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "1 of the 2 files of" in line and "a.tar: " in line and "--skip_damaged" in line
    assert any(each in line for each in reason.split("|")), line
    assert [file.name for file in tmp_path.iterdir()] == ["in"]
    listing = list_pictures(tmp_path / "in", skip_damaged=True)
    assert len(listing.splits["train"]) >= 30 and [name for name, _ in listing.dropped] == ["a.tar"]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"url": ["a"], "words": ["b"]}, {}, r"no column of pictures .*url \(string\).*--image_column=NAME"),
        ({"image": [b"a"], "words": ["b"]}, {}, r"no column of captions .*words \(string\).*--caption_column=NAME"),
        ({"image": [b"a"], "text": ["b"]}, {"image_column": "photo"}, "no column 'photo', only image"),
        ({"image": ["https://x"], "text": ["b"]}, {"image_column": "image"}, "of string, which holds no pictures"),
        ({"image": [b"a"], "text": [1.5]}, {"caption_column": "text"}, "of double, which holds no captions"),
        (
            {"image": [b"a"], "label": [1]},
            {"caption_column": "label"},
            "numbers in the column 'label' and no names of cl",
        ),
        (
            {"image": [b"a"], "text": ["b"]},
            {"label_template": "a {label}"},
            "label_template does not apply to a.parquet",
        ),
        ({"image": [b"a"], "text": ["b"]}, {"label_template": "a photo"}, "has no place for the label"),
        ({"image": [b"a"], "text": ["b"]}, {"lines": "first"}, "--text_lines=first does not apply to .parquet files"),
        ({"image": [b"a"], "text": ["b"]}, {"repeats": False}, "--no_repeats does not apply"),
        (
            {"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())},
            {},
            "no pictures .1 files without a p",
        ),
    ],
)
def test_tables_and_settings_that_do_not_go_together_are_refused(
    columns: dict[str, Any], options: dict[str, Any], message: str, tmp_path: pathlib.Path
) -> None:
    place = write_table(tmp_path / "a.parquet", columns)
    with pytest.raises(UserError, match=message) as raised:
        list_pictures(place, **options)
    assert "\n" not in str(raised.value)


def test_rows_that_cannot_be_used_are_dropped_one_by_one(tmp_path: pathlib.Path) -> None:
    good = {"bytes": b"x", "path": None}
    images = [good, None, {"bytes": None, "path": None}, {"bytes": None, "path": "/etc/passwd"}, good, good, good]
    texts = ["A", "B", "C", "D", None, " ", "\ud83d"]
    rows = pa.table({"image": images, "text": [*texts[:6], "G"]})
    found = list(read(list_pictures(write_table(tmp_path / "a.parquet", rows))).values())
    assert found == [
        (b"x", ("A",)),
        *["the picture is null"] * 2,
        "the table has the picture's path, not the picture: /etc/passwd",
        "no caption: it is null",
        "empty caption",
        (b"x", ("G",)),
    ]
    bad = pa.table({"image": [b"x"], "text": pa.array([b"caf\xe9"], pa.binary()).cast(pa.string(), safe=False)})
    assert list(read(list_pictures(write_table(tmp_path / "b.parquet", bad))).values()) == ["not UTF-8 text"]
    nulls = pa.table({"image": [b"x"], "text": pa.nulls(1)})
    assert list(read(list_pictures(write_table(tmp_path / "c.parquet", nulls))).values()) == ["no caption: it is null"]
    several = pa.table({"image": [b"x"], "captions": [["A", None, "B"]]})
    assert list(read(list_pictures(write_table(tmp_path / "d.parquet", several))).values()) == [(b"x", ("A", "B"))]


def test_classes_of_a_table_are_captions_by_a_template(tmp_path: pathlib.Path) -> None:
    features = {"label": {"_type": "ClassLabel", "names": ["tabby_cat", "dog"]}}
    noted = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"image": [b"x"] * 4, "label": [1, 0, -1, 2]}).replace_schema_metadata(noted)
    place = write_table(tmp_path / "a.parquet", table)
    found = list(read(list_pictures(place, label_template="a photo of a {label}")).values())
    assert found[:2] == [(b"x", ("a photo of a dog",)), (b"x", ("a photo of a tabby cat",))]
    assert found[2:] == ["no caption: -1 is no class", "no caption: 2 is no class"]
    names = pa.table({"image": [b"x"], "label": ["dog"]})
    place = write_table(tmp_path / "b.parquet", names)
    assert list(read(list_pictures(place, label_template="a {label}")).values()) == [(b"x", ("a dog",))]
    tar = write_tar(tmp_path / "c.tar", {"train/tabby_cat/1.jpg": b"x"})
    assert list(read(list_pictures(tar, label_template="a {label}")).values()) == [(b"x", ("a tabby cat",))]


def test_a_table_that_is_cut_or_changed_says_where(tmp_path: pathlib.Path) -> None:
    place = write_table(
        tmp_path / "a.parquet", as_datasets(drawn(8)), row_group_size=4, compression="none", write_page_checksum=True
    )
    content = bytearray(place.read_bytes())
    at = content.index(drawn(1, 5)["000005.png"][0]) + 40
    content[at] ^= 1
    place.write_bytes(content)
    found = list(read(list_pictures(place)).values())
    assert found[:4] == expected(drawn(4))
    assert all(str(each).startswith("the table cannot be read here: ") for each in found[4:])
    place.write_bytes(content[:-9])
    with pytest.raises(UserError, match=r"1 of the 1 files .* \(a.parquet: not a table in Parquet, or cut: .*\); copy"):
        list_pictures(place)


def test_a_row_group_of_any_size_is_read_in_little_memory(tmp_path: pathlib.Path) -> None:
    images = [bytes([number]) * 200_000 for number in range(100)]
    options = {"row_group_size": 100, "write_batch_size": 8, "compression": "none", "use_dictionary": False}
    place = write_table(tmp_path / "a.parquet", {"image": images, "text": ["x"] * 100}, **options)
    pool = pa.system_memory_pool()
    before, was = pool.max_memory(), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        assert all(
            each.read().image == image for each, image in zip(list_pictures(place).splits["train"], images, strict=True)
        )
    finally:
        pa.set_memory_pool(was)
    assert pool.max_memory() - before < 8_000_000  # of 20


@pytest.mark.parametrize(
    ("make", "pattern", "message"),
    [
        (["a.tar", "b.parquet"], "", r"holds 1 .tar and 1 .parquet files; give a pattern of one format"),
        (["a.tar", "b.png"], "", r"holds pictures \(such as b.png\) and archives .*or move them away"),
        (["a.tar", "b.png"], "/*", "is tars or tables and pictures .* or a pattern of the others alone"),
        (["b.png"], "/*.png", "is pictures .* give a folder"),
        (["b.png"], "/b.png", "is pictures .* give a folder"),
        (["a.tar.gz"], "/a.tar.gz", "is not read, only folders of pictures and .tar .parquet; unpack it"),
        (["a.zip"], "/*", "unpack it and give what was in it"),
        (["a.arrow"], "/a.arrow", "give one of these"),
        (["a.tar"], "/b.tar", "is not a folder, nor a file"),
        (["a.tar"], "/b*.tar", "is not a folder, nor a file, nor a pattern"),
        (["a.tar"], "/{3..1}.tar", "is no range of numbers"),
        (
            ["0.tar"],
            "/{0..2}.tar",
            r"2 of the 3 files .* are damaged \(1.tar: there is no such file; 2.tar: there is no ",
        ),
    ],
)
def test_places_that_are_no_archives_or_several_kinds_are_told(
    make: list[str], pattern: str, message: str, tmp_path: pathlib.Path
) -> None:
    for name in make:
        if name.endswith(".tar"):
            write_tar(tmp_path / "in" / name, members(drawn(1)))
        elif name.endswith(".parquet"):
            write_table(tmp_path / "in" / name, as_datasets(drawn(1)))
        else:
            (tmp_path / "in").mkdir(exist_ok=True)
            (tmp_path / "in" / name).write_bytes(b"x")
    with pytest.raises(UserError, match=message) as raised:
        list_pictures(f"{tmp_path / 'in'}{pattern}")
    assert "\n" not in str(raised.value)


def test_img2datasets_folder_is_its_tars(tmp_path: pathlib.Path) -> None:
    for number in range(2):
        write_tar(tmp_path / "in #[1]" / f"{number:05}.tar", members(drawn(2, 2 * number), ".json"))
        write_table(tmp_path / "in #[1]" / f"{number:05}.parquet", {"url": ["a"], "caption": ["b"], "status": ["x"]})
        (tmp_path / "in #[1]" / f"{number:05}_stats.json").write_text("{}")
    listing = list_pictures(tmp_path / "in #[1]")
    assert list(read(listing).values()) == expected(drawn(4))
    assert listing.passed == {"tables beside tars of their names": 2}
    numbers = list_pictures(f"{tmp_path}/in #[[]1]/{{00000..00001}}.tar")
    assert len(numbers.splits["train"]) == 4


def test_a_stranger_s_format_is_one_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lines(list[Named]):
        def part(self, first: int, last: int) -> "Lines":
            return Lines(self[first:last])

        def digest(self) -> str:
            return str([each.name for each in self])

    def opened(path: Any, name: str, settings: Any) -> Archive:
        rows = path.read_text().splitlines()
        made = (Item(f"{name}:{row}", drawn(1)["000000.png"][0], [row]) for row in rows)
        return Archive(Lines(Named(item.name, lambda item=item: item) for item in made))

    monkeypatch.setattr(READERS, "_registered", {})
    READERS.register(".rows", Reader(opened, frozenset()))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.rows").write_text("A\nB")
    build(tmp_path / "in", tmp_path / "set", workers=1)
    assert captions(open_source(tmp_path / "set")) == ["A", "B"]


ON_A_BUCKET = """
import sys
from offsetjax.data.places import list_pictures
from offsetjax.errors import UserError

for place in ("", "**/*.tar", "in", "in/*.tar", "in/{0..1}.tar", "tables/a.parquet"):
    try:
        listing = list_pictures(f"{sys.argv[1]}/{place}")
        print([(each.name[-13:], each.read().captions) for each in listing.splits["train"]])
    except UserError as error:
        print(error)
"""


@pytest.mark.slow
def test_tars_and_tables_on_a_bucket_are_read_where_they_lie(tmp_path: pathlib.Path) -> None:
    with bucket() as store:
        for number in range(2):
            store.put(f"in/{number}.tar", write_tar(tmp_path / "a", members(drawn(1, number))).read_bytes())
        store.put("tables/a.parquet", write_table(tmp_path / "b", as_datasets(drawn(2))).read_bytes())
        store.put("other/000.txt", b"")
        lines = run_on(store, ON_A_BUCKET, f"gs://{BUCKET}", cwd=tmp_path).splitlines()
    assert lines[0].startswith("data: gs://bucket/ holds 2 .tar and 1 .parquet files")
    assert lines[1].startswith("data: gs://bucket/**/*.tar: ** would list the whole of a bucket")
    assert lines[2:5] == ["[('ar/000000.png', ('picture 0 — ö',)), ('ar/000001.png', ('picture 1 — ö',))]"] * 3
    assert lines[5] == "[('s/a.parquet:1', ('picture 0 — ö',)), ('s/a.parquet:2', ('picture 1 — ö',))]"


def test_the_reader_of_a_tar_keeps_none_of_it(tmp_path: pathlib.Path) -> None:
    place = write_tar(tmp_path / "a.tar", {f"{number}.png": bytes(10**6) for number in range(3)})
    items = list_pictures(place).splits["train"]
    assert len(pickle.dumps(items)) < 5000  # as other processes are sent it
