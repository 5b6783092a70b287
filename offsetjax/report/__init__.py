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
from offsetjax.files import check_file, check_folder, write_whole
from offsetjax.report import curves, figures, page
from offsetjax.report.conclusions import conclusions, trained_on_black
from offsetjax.report.headline import headline
from offsetjax.report.numbers import summarise
from offsetjax.report.pool import Pool, pool
from offsetjax.report.read import read_arms, read_picture
from offsetjax.report.swept import Series, find_series, sentences, swept

GRID_WIDTH = 1200  # pixels


def report(workdirs: Sequence[str], out: str) -> None:
    """Writes `out` (HTML), its figures in the folder `NAME_files`, and `report.json`, all beside one another.

    Args:
        workdirs: the work directories of one or more trainings, or folders of them.
        out: path of the page, ending in .html.

    Raises:
        UserError: a work directory that is missing or malformed, or an `out` that cannot be written.
    """
    target = epath.Path(out)
    if target.suffix != ".html":
        raise UserError(f"report: --out={out} must end in .html")
    check_file("report", target)
    folder = check_folder("report", target.parent / f"{target.stem}_files")
    arms = read_arms(workdirs)
    pools = pool(arms)
    series = find_series(pools)
    numbers, pooled = summarise(arms), summarise([each.arm for each in pools])
    numbers["conclusions"] = [*sentences(series), *conclusions(pooled, numbers["arms"])]
    numbers["pools"] = [
        {**summary, "runs": [run.name for run in each.runs]}
        for each, summary in zip(pools, pooled["arms"], strict=True)
    ]
    pictures = _pictures(pools, series, numbers["pools"])
    for name, png in pictures.items():
        write_whole(folder / f"{name}.png", png)
    text = json.dumps(numbers, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(target.parent / "report.json", f"{text}\n")
    write_whole(target, page.render(numbers, pictures))


def _pictures(pools: Sequence[Pool], series: Sequence[Series], summaries: Sequence[dict]) -> dict[str, bytes]:
    firsts = [each.first for each in pools]
    scenes = [first for first, summary in zip(firsts, summaries, strict=True) if not trained_on_black(summary)]
    drawn: dict[str, Figure | None] = {
        "headline": headline(scenes or firsts),
        "swept": swept(series),
        "brightness": figures.brightness(summaries),
        "curves": figures.curves(summaries),
        "unconditional": figures.unconditional_spread(summaries),
        "losses": curves.losses(pools),
        "validation": curves.validation(pools),
        "probe": curves.probe(pools),
    }
    pictures = {name: _png(figure) for name, figure in drawn.items() if figure}
    for index, arm in enumerate(firsts):
        grids = [("before", arm.steps[0])] if len(arm.steps) > 1 else []
        grids += [("after", samples) for samples in arm.steps[-1:]]
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


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
