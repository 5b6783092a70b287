"""The report's figures are those of the work directories, and its sentences turn when the figures do."""

import base64
import io
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from offsetjax.config import default_config, flatten, to_json
from offsetjax.data import record
from offsetjax.errors import UserError
from offsetjax.report import figures, read, report
from offsetjax.report.headline import cells
from offsetjax.report.numbers import noise_name
from offsetjax.report.section import Reference, Section
from offsetjax.sampling.pictures import Picture, write_samples
from offsetjax.sampling.sample import about_samples
from offsetjax.training.goodput import Goodput

SQUARE, SKI, LOGO = "a town square by torchlight", "a ski slope in the sun", "a line-art logo"
Brightness = Mapping[str, Sequence[float]]


def _samples(workdir: pathlib.Path, name: str, config: Any, step: int, brightness: Brightness) -> None:
    pictures = [
        Picture(prompt, seed, np.full((16, 16, 3), round(value * 255), np.uint8))
        for prompt, values in brightness.items()
        for seed, value in enumerate(values)
    ]
    write_samples(
        workdir / "samples", name, pictures, about_samples(config.sample, config.data.resolution, step, "ema")
    )


def _workdir(
    workdir: pathlib.Path,
    strength: float,
    samples: Mapping[int, Brightness],
    unconditional: Mapping[str, Sequence[float]] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> str:
    """A work directory as the training leaves it, of 100 steps at two a second."""
    workdir.mkdir(parents=True)
    config = default_config()
    config.noise.offset_strength = strength
    config.train.steps = 100
    config.data.path = "pictures"
    config.data.resolution = 64
    config.update_from_flattened_dict(changes or {})
    (workdir / "config.json").write_text(to_json(config))
    lines = [
        {"step": step, "loss": 1 / step, "grad_norm": 1.0, "learning_rate": 1e-3, "images_per_second": 16.0}
        | {"step_seconds": 0.5, "data_wait_seconds": 0.0, "skipped": 0, "time_seconds": step / 2}
        for step in range(10, 101, 10)
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step, brightness in samples.items():
        _samples(workdir, f"step_{step}", config, step, brightness)
    for start, values in (unconditional or {}).items():
        config.sample.start_noise = start
        _samples(workdir, f"unconditional_{start}", config, 100, {"": values})
    return str(workdir)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Callable[[Brightness], None]:
    """Sets the data set that every config's data.path stands for; until then there is none."""

    def missing(path: str, *_: Any) -> Any:
        raise UserError(f"data: {path} holds no data set")

    def use(brightness: Brightness) -> None:
        monkeypatch.setattr(read, "open_source", lambda *_: _source(brightness))

    monkeypatch.setattr(read, "open_source", missing)
    return use


def _source(brightness: Brightness) -> list[record.Picture]:
    """Pictures twice as wide as high, of which training sees the middle; the rest is black."""
    examples = []
    for caption, values in brightness.items():
        for value in values:
            picture, file = Image.new("RGB", (128, 64)), io.BytesIO()
            picture.paste((round(value * 255),) * 3, (32, 0, 96, 64))
            picture.save(file, "PNG")
            examples.append(record.Picture(file.getvalue(), caption))
    return examples


def _run(out: pathlib.Path, *workdirs: str, sections: Sequence[Section] = ()) -> tuple[dict[str, Any], str]:
    report(workdirs, str(out / "page.html"), sections)
    return json.loads((out / "report.json").read_text()), (out / "page.html").read_text()


GREY = {SQUARE: (0.4, 0.6), SKI: (0.4, 0.6), LOGO: (0.4, 0.6)}
WIDE = {SQUARE: (0.0, 0.2), SKI: (0.6, 0.8), LOGO: (0.8, 1.0)}


def test_losses_are_shown_by_size(tmp_path: pathlib.Path) -> None:
    workdir = _workdir(tmp_path / "shapes", 0.1, {100: GREY})
    file = pathlib.Path(workdir) / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for number, line in enumerate(lines):
        line |= {"loss_of_sizes": 0.5, "loss_1152x896": 0.25} | ({"loss_896x1152": 0.75} if number % 2 else {})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    numbers, html = _run(tmp_path, workdir)
    [run] = numbers["runs"]
    assert run["last_loss"] == 0.5 and run["last_loss_by_size"] == {"1152x896": 0.25, "896x1152": 0.75}
    assert "Loss by the size of pictures" in html and any(tmp_path.rglob("sizes.png"))


def test_stages_are_shown_with_what_is_set_for_them(tmp_path: pathlib.Path, data: Callable[[Brightness], None]) -> None:
    data(GREY)
    stages = ("train.steps=50 data.resolution=32", "train.steps=30 data.resolution=64", "train.steps=20")
    workdir = _workdir(tmp_path / "staged", 0.1, {100: GREY}, changes={"train.stages": stages})
    numbers, html = _run(tmp_path, workdir)
    found = numbers["runs"][0]["stages"]
    assert [(each["first_step"], each["last_step"]) for each in found] == [(1, 50), (51, 80), (81, 100)]
    assert [each["last_loss"] for each in found] == [1 / 50, 1 / 80, 1 / 100]
    assert found[0]["settings"] == {"data.resolution": 32}
    assert "<h2>Stages</h2>" in html and "51 to 80" in html and "data.resolution 64" in html


def test_the_numbers_are_those_of_the_files(tmp_path: pathlib.Path, data: Callable[[Brightness], None]) -> None:
    data({SQUARE: (0.0, 0.2), SKI: (0.6,)})
    numbers, html = _run(tmp_path, _workdir(tmp_path / "fine", 0.1, {0: GREY, 50: GREY, 100: WIDE}))
    [run] = numbers["runs"]
    assert (run["name"], run["offset_strength"], run["steps"], run["wall_clock_seconds"]) == ("fine", 0.1, 100, 50.0)
    assert [samples["step"] for samples in run["samples"]] == [0, 50, 100]
    assert run["before"]["prompts"][SQUARE] == {"mean": 0.5, "std": pytest.approx(0.1, abs=1e-4), "count": 2}
    assert run["after"]["prompts"][SKI]["mean"] == pytest.approx(0.7, abs=0.002)
    assert run["last_loss"] == 0.01
    assert run["data"]["prompts"][SQUARE] == {"mean": 0.1, "std": 0.1, "count": 2}
    assert run["data"]["brightness"]["mean"] == pytest.approx(0.8 / 3, abs=1e-4)
    assert run["data"]["brightness"]["std"] == pytest.approx(np.std([0, 0.2, 0.6]), abs=1e-4)
    assert "0.100 ± 0.100" in html


def test_the_seconds_of_each_run_are_a_bar_of_all_its_wall_clock(tmp_path: pathlib.Path, data: Any) -> None:
    now = [0.0]
    workdirs = [_workdir(tmp_path / name, 0.1, {}) for name in ("one", "two")]
    for workdir, steps in zip(workdirs, (60.0, 20.0), strict=True):
        goodput = Goodput(workdir, clock=lambda: now[0], now=lambda: now[0])
        now[0] += 20
        goodput.resumed(0)
        now[0] += steps
        goodput.write()
    numbers, html = _run(tmp_path, *workdirs)
    assert (tmp_path / "page_files" / "seconds.png").stat().st_size > 5000
    assert "in white, the share of steps" in html and "75.0%" in html
    [axes] = figures.seconds(numbers["runs"]).axes
    bars = {each.get_label(): [bar.get_width() for bar in each] for each in axes.containers}
    assert bars == {"step": pytest.approx([75, 50]), "start": pytest.approx([25, 50])}
    assert [text.get_text() for text in axes.texts] == ["75%", "50%"]
    assert figures.seconds([{**run, "seconds": {}} for run in numbers["runs"]]) is None


def test_the_sentence_about_the_range_follows_the_figures(tmp_path: pathlib.Path, data: Any) -> None:
    for name, after, verdict in (
        ("grey", GREY, "the samples are grey, whatever the prompt"),
        ("wide", WIDE, "a range of 0.80: from dark to bright"),
        ("whole", {SQUARE: (0.02,), SKI: (0.9,), LOGO: (0.98,)}, "a range of 0.96: from black to white"),
        ("half", {SQUARE: (0.3,), SKI: (0.6,), LOGO: (0.6,)}, "do not reach from dark to bright"),
        ("black", {SQUARE: (0.01,), SKI: (0.02,), LOGO: (0.0,)}, "every prompt comes out dark"),
    ):
        numbers, _ = _run(tmp_path, _workdir(tmp_path / name, 0.1, {0: GREY, 100: after}))
        assert verdict in numbers["conclusions"][0], name
        assert numbers["conclusions"][0].startswith(f"{name} (offset_strength 0.1)")


def test_the_comparison_of_plain_and_offset_follows_the_figures(tmp_path: pathlib.Path, data: Any) -> None:
    plain = _workdir(tmp_path / "plain", 0.0, {0: GREY, 100: GREY})
    wider = _workdir(tmp_path / "wider", 0.1, {0: GREY, 100: WIDE})
    same = _workdir(tmp_path / "same", 0.1, {0: GREY, 100: GREY})
    other = _workdir(tmp_path / "other", 0.1, {0: GREY, 100: WIDE}, changes={"optimizer.learning_rate": 0.5})
    assert "so it is the noise that widened the range" in " ".join(_run(tmp_path, plain, wider)[0]["conclusions"])
    assert "so the noise did not widen the range" in " ".join(_run(tmp_path, plain, same)[0]["conclusions"])
    numbers, html = _run(tmp_path, plain, other)
    assert "alone" not in " ".join(numbers["conclusions"]), "two fields differ: no controlled comparison"
    assert numbers["config_differences"] == {
        "noise.offset_strength": [0.0, 0.1],
        "optimizer.learning_rate": [1e-5, 0.5],
    }
    assert "<td class='text'>optimizer.learning_rate</td>" in html


@pytest.mark.parametrize(
    ("plain", "matched", "expected"),
    [
        ((0.5, 0.6), (0.1, 0.9), "the matched start noise that restores the spread, not the training"),
        ((0.1, 0.9), (0.1, 0.9), "restores the spread even from a plain start"),
        ((0.1, 0.9), (0.5, 0.6), "contrary to the theory"),
        ((0.5, 0.6), (0.5, 0.6), "Neither start restores the spread, and the start noise makes no difference"),
    ],
)
def test_the_unconditional_spread(tmp_path: pathlib.Path, data: Any, plain: Any, matched: Any, expected: str) -> None:
    data({SKI: (0.0, 1.0)})
    workdir = _workdir(tmp_path / "a", 0.1, {}, {"plain": plain, "matched": matched})
    numbers, html = _run(tmp_path, workdir)
    assert numbers["runs"][0]["unconditional"]["plain"]["std"] == pytest.approx(np.std(plain), abs=0.002)
    assert expected in " ".join(numbers["conclusions"])
    assert "Spread of brightness without a prompt" in html


def test_a_plain_training_without_samples_or_data(tmp_path: pathlib.Path, data: Any) -> None:
    numbers, html = _run(tmp_path, _workdir(tmp_path / "vae", 0.0, {}))
    assert numbers["runs"][0]["after"] is None and numbers["conclusions"] == []
    assert "pictures holds no data set" in html and "Loss" in html


class _Sources(HTMLParser):
    """Collects all that a browser would load, and the text that it would run."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]


def test_the_page_is_self_contained_and_its_text_escaped(tmp_path: pathlib.Path, data: Any) -> None:
    prompts = {"<b>$bold$</b> & co": (0.1, 0.2), "<script>alert(1)</script>": (0.3, 0.4)}
    _, html = _run(tmp_path, _workdir(tmp_path / "a<i>", 0.1, {0: prompts, 100: prompts}))
    parser = _Sources()
    parser.feed(html)
    assert parser.sources and all(source.startswith("data:image/png;base64,") for source in parser.sources)
    assert not parser.tags & {"b", "i", "script", "link", "iframe"}
    assert "http" not in re.sub(r"base64,[^']*", "", html)
    assert "&lt;script&gt;" in html and str(tmp_path) not in html
    for source in parser.sources:
        Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))).verify()
    names = {path.name for path in (tmp_path / "page_files").iterdir()}
    assert {"headline.png", "brightness.png", "curves.png", "losses.png", "before_0.png", "after_0.png"} == names


def test_a_grid_is_cut_at_its_pictures(tmp_path: pathlib.Path, data: Any) -> None:
    workdir = _workdir(tmp_path / "a", 0.1, {0: WIDE})
    [run] = read.read_runs([workdir])
    cut = cells(run.steps[0])
    for prompt, values in WIDE.items():
        for picture, value in zip(cut[prompt], values, strict=True):
            assert np.ptp(np.asarray(picture)) == 0 and picture.size == (16, 16)
            assert np.asarray(picture).mean() / 255 == pytest.approx(value, abs=0.002)


def test_runs_of_the_same_name_are_told_apart_by_their_parents(tmp_path: pathlib.Path, data: Any) -> None:
    runs = [_workdir(tmp_path / parent / "run", 0.0, {}) for parent in ("a", "b")]
    assert [run["name"] for run in _run(tmp_path, *runs)[0]["runs"]] == ["a/run", "b/run"]
    with pytest.raises(UserError, match="given twice"):
        _run(tmp_path, runs[0], runs[0])


def test_a_line_half_written_by_a_running_training_is_left_out(tmp_path: pathlib.Path, data: Any) -> None:
    workdir = pathlib.Path(_workdir(tmp_path / "a", 0.0, {}))
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 110, "lo')
    numbers, _ = _run(tmp_path, str(workdir))
    assert numbers["runs"][0]["steps"] == 100


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "config.json is missing; give"),
        ("config.json", "{", "config.json is not a JSON config"),
        ("config.json", "{}", "config.json lacks noise.offset_strength"),
        ("metrics.jsonl", "nonsense\n", "metrics.jsonl, line 1 is not a step's metrics; resume the training, which"),
        ("samples/step_0.json", "[]", "step_0.json is not a record of samples"),
        ("samples/step_0.json", '{"step": 0}', "(no 'params'); draw it again"),
        ("samples/step_0.png", "nonsense", "step_0.png is not a readable picture; draw it again"),
    ],
)
def test_a_malformed_file_is_named_with_the_remedy(
    tmp_path: pathlib.Path, data: Any, name: str, content: str | None, message: str
) -> None:
    workdir = _workdir(tmp_path / "a", 0.0, {0: WIDE})
    path = pathlib.Path(workdir) / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        _run(tmp_path, workdir)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "page.html").exists()


def test_a_brightness_out_of_range_is_an_error(tmp_path: pathlib.Path, data: Any) -> None:
    workdir = _workdir(tmp_path / "a", 0.0, {0: WIDE})
    path = pathlib.Path(workdir) / "samples/step_0.json"
    path.write_text(path.read_text().replace("0.2", "20.0", 1))
    with pytest.raises(UserError, match="not between 0 and 1"):
        _run(tmp_path, workdir)


def test_out_must_be_a_page(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=re.escape("must end in .html")):
        report([str(tmp_path)], str(tmp_path / "page.pdf"))


@pytest.mark.parametrize(
    ("place", "take", "words"),
    [
        ("page.html", pathlib.Path.mkdir, "is a folder, where --out needs a file"),
        ("page_files", pathlib.Path.touch, "is a file, where --out needs a folder"),
    ],
)
def test_an_out_that_cannot_be_is_told_before_the_runs_are_read(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    take: Callable[[pathlib.Path], None],
    words: str,
) -> None:
    monkeypatch.setattr("offsetjax.report.read_runs", None)
    take(tmp_path / place)
    with pytest.raises(UserError, match=f"^report: {tmp_path / place} {words}; give another --out$"):
        report([str(tmp_path)], str(tmp_path / "page.html"))


def test_a_folder_that_is_not_ours_is_told_before_the_runs_are_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offsetjax.report.read_runs", None)
    monkeypatch.setattr("os.access", lambda *_: False)  # as for whoever is not root
    with pytest.raises(UserError, match=f"^report: {tmp_path} cannot be written to; give another --out$"):
        report([str(tmp_path)], str(tmp_path / "new" / "page.html"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"noise.offset_strength": 0.0}, "plain noise"),
        ({}, "offset_strength 0.1"),
        ({"noise.offset_strength": 0.0, "noise.channel_strengths": (0.1, 0.25, 0.0, 0.0)}, "offset up to 0.25"),
        ({"noise.kind": "adjusted"}, "adjusted, offset_strength 0.1"),
        ({"noise.offset_strength": 0.0, "schedule.zero_terminal_snr": True}, "plain noise, zero terminal SNR"),
    ],
)
def test_a_run_is_named_by_its_noise(tmp_path: pathlib.Path, data: Any, changes: Mapping[str, Any], words: str) -> None:
    numbers, html = _run(tmp_path, _workdir(tmp_path / "run", 0.1, {0: GREY, 100: WIDE}, changes=changes))
    assert numbers["runs"][0]["noise"] == words
    assert f"<td>{words}</td>" in html


def test_validation_and_probe_are_drawn_and_are_no_training_steps(tmp_path: pathlib.Path, data: Any) -> None:
    workdir = _workdir(tmp_path / "run", 0.1, {0: GREY, 100: WIDE})
    assert "Validation loss" not in _run(tmp_path, workdir)[1]
    names = ("mean", "std", "near_black", "near_white", "wasserstein")
    evaluations = [
        {"step": step, "validation_plain": 0.5, "validation_plain_t100": 0.4, "validation_plain_t999": 0.6}
        for step in (0, 100)
    ] + [{"step": step, **{f"brightness_{name}": 0.3 for name in names}} for step in (0, 100)]
    file = pathlib.Path(workdir) / "metrics.jsonl"
    before = file.read_text()
    lines = [json.dumps({**line, "time_seconds": 1.0}) + "\n" for line in evaluations]
    file.write_text(lines[0] + lines[2] + before + lines[1] + lines[3])
    numbers, html = _run(tmp_path, workdir)
    assert "<h2>Validation loss</h2>" in html and "<h2>Brightness of a probe</h2>" in html
    assert (numbers["runs"][0]["first_loss"], numbers["runs"][0]["last_loss"]) == (0.1, 0.01)
    assert numbers["runs"][0]["wall_clock_seconds"] == 50.0


def test_a_user_s_report_has_nothing_of_the_article(tmp_path: pathlib.Path, data: Any) -> None:
    prompts = {"a neon logo of a bakery": (0.3, 0.4), "a town square at noon": (0.6, 0.7), "all black": (0.5, 0.4)}
    numbers, html = _run(tmp_path, _workdir(tmp_path / "run", 0.1, {0: prompts, 100: prompts}))
    text = re.sub(r"base64,[^']*", "", html) + json.dumps(numbers)
    assert "article" not in text.lower() and "Guttenberg" not in text and "black picture" not in text
    assert list(numbers["runs"][0]["after"]["prompts"]) == list(prompts), "the prompts keep their order"


def _height(picture: pathlib.Path) -> int:
    with Image.open(picture) as image:
        return image.height


def test_a_caller_s_section_is_in_the_numbers_the_sentences_and_the_page(tmp_path: pathlib.Path, data: Any) -> None:
    section = Section(
        name="rival",
        numbers={"year": 2031},
        note="“A rival” is nobody.",
        reference=lambda prompt: Reference("a rival", 0.2, 0.8) if prompt == SKI else None,
        about=lambda run: {"is_long": run.config["train.steps"] > 50},
        conclusions=lambda runs: [f"{run['name']} is long: {run['rival']['is_long']}." for run in runs],
    )
    workdir = _workdir(tmp_path / "run", 0.1, {0: GREY, 100: WIDE})
    _run(tmp_path, workdir)
    height_without = _height(tmp_path / "page_files" / "brightness.png")
    numbers, html = _run(tmp_path, workdir, sections=[section, Section("empty")])
    assert (numbers["rival"], numbers["runs"][0]["rival"]) == ({"year": 2031}, {"is_long": True})
    assert "run is long: True." in numbers["conclusions"] and "run is long: True." in html
    assert "“A rival” is nobody." in html
    height = _height(tmp_path / "page_files" / "brightness.png")
    assert height > height_without, "the published figure has a row of its own"
    other = _workdir(tmp_path / "other", 0.1, {0: {LOGO: (0.1,)}})
    assert "nobody" not in _run(tmp_path, other, sections=[section])[1], "no prompt has a published figure"


def test_a_changed_bit_in_a_record_of_samples_is_found(tmp_path: pathlib.Path) -> None:
    image = np.full((16, 16, 3), 200, np.uint8)
    about = {"step": 3, "params": "ema", "start_noise": "plain", "guidance_scale": 7.5, "num_steps": 2}
    write_samples(tmp_path, "step_3", [Picture("a cat", 0, image)], about)
    file = tmp_path / "step_3.json"
    assert read._read_samples(file).step == 3
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(UserError, match=r"step_3.json is not a record of samples \(it is damaged: its digest"):
        read._read_samples(file)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "plain noise"),
        ({"noise__offset_strength": 0.1, "schedule__process": "flow"}, "offset_strength 0.1, flow"),
        ({"schedule__process": "flow", "schedule__conversion": "mapped"}, "plain noise, mapped flow"),
        (
            {"noise__offset_strength": 0.1, "noise__anneal": 0.5, "schedule__zero_terminal_snr": True},
            "offset_strength 0.1, annealed, zero terminal SNR",
        ),
    ],
)
def test_a_noise_is_named_with_its_process(changes: dict[str, Any], words: str) -> None:
    config = default_config()
    config.update_from_flattened_dict({path.replace("__", "."): value for path, value in changes.items()})
    assert noise_name(dict(flatten(config))) == words
