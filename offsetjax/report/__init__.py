"""`offsetjax report`: what one training did, or how several compare, as a page, its figures and a file of numbers.

The page is for any set of work directories; its headline is the question of offset noise: from how dark to how bright
the generated pictures go, before and after.
"""

import io
import json
from collections.abc import Sequence

from etils import epath
from matplotlib.figure import Figure

from offsetjax.errors import UserError
from offsetjax.files import check_file, check_folder, write_all
from offsetjax.plots import png
from offsetjax.report import curves, figures, page
from offsetjax.report.conclusions import conclusions
from offsetjax.report.headline import headline
from offsetjax.report.numbers import summarise
from offsetjax.report.pool import Pool, pool
from offsetjax.report.read import read_picture, read_runs
from offsetjax.report.section import Section, find_notes, find_references
from offsetjax.report.swept import Series, find_series, sentences, swept

GRID_WIDTH = 1200  # pixels


def report(workdirs: Sequence[str], out: str, sections: Sequence[Section] = ()) -> None:
    """Writes `out` (HTML), its figures in the folder `NAME_files`, and `report.json`, all beside one another.

    Args:
        workdirs: the work directories of one or more trainings, or folders of them.
        out: path of the page, ending in .html.
        sections: what the caller adds, such as published figures to compare with.

    Raises:
        UserError: a work directory that is missing or malformed, or an `out` that cannot be written.
    """
    target = epath.Path(out)
    if target.suffix != ".html":
        raise UserError(f"report: --out={out} must end in .html")
    check_file("report", target)
    folder = check_folder("report", target.parent / f"{target.stem}_files")
    runs = read_runs(workdirs)
    pools = pool(runs)
    series = find_series(pools)
    numbers, pooled = summarise(runs, sections), summarise([each.combined for each in pools], sections)
    numbers["conclusions"] = [*sentences(series), *conclusions(pooled, numbers["runs"], sections)]
    numbers["pools"] = [
        {**summary, "runs": [run.name for run in each.runs]}
        for each, summary in zip(pools, pooled["runs"], strict=True)
    ]
    pictures = _pictures(pools, series, numbers["pools"], sections)
    if spent := figures.seconds(numbers["runs"]):
        pictures["seconds"] = png(spent)
    files: dict[epath.Path, bytes | str] = {folder / f"{name}.png": content for name, content in pictures.items()}
    text = json.dumps(numbers, indent=1, ensure_ascii=False, allow_nan=False)
    files[target.parent / "report.json"] = f"{text}\n"
    note = find_notes(sections, figures.all_prompts(numbers["pools"]))
    write_all({**files, target: page.render(numbers, pictures, note)})


def _pictures(
    pools: Sequence[Pool], series: Sequence[Series], summaries: Sequence[dict], sections: Sequence[Section]
) -> dict[str, bytes]:
    firsts = [each.first for each in pools]
    drawn: dict[str, Figure | None] = {
        "headline": headline(firsts),
        "swept": swept(series),
        "brightness": figures.brightness(summaries, find_references(sections, figures.all_prompts(summaries))),
        "curves": figures.curves(summaries),
        "unconditional": figures.unconditional_spread(summaries),
        "losses": curves.losses(pools),
        "sizes": curves.losses_of_sizes(pools),
        "validation": curves.validation(pools),
        "probe": curves.probe(pools),
    }
    pictures = {name: png(figure) for name, figure in drawn.items() if figure}
    for index, run in enumerate(firsts):
        grids = [("before", run.steps[0])] if len(run.steps) > 1 else []
        grids += [("after", samples) for samples in run.steps[-1:]]
        for when, samples in grids:
            if samples.picture:
                pictures[f"{when}_{index}"] = _grid(samples.picture)
    return pictures


def _grid(path: epath.Path) -> bytes:
    """A grid's PNG, no wider than a page needs it: a sweep has many."""
    image = read_picture(path)
    if image.width <= GRID_WIDTH:
        return path.read_bytes()
    buffer = io.BytesIO()
    image.resize((GRID_WIDTH, round(image.height * GRID_WIDTH / image.width))).save(buffer, "PNG")
    return buffer.getvalue()
