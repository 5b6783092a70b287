"""Plans as text: a line each in a table, and one plan in full."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from offsetjax.plan.estimate import ASSUMPTIONS, Plan


def show(plans: list[Plan]) -> RenderableType:
    """Each plan in full, and a table of all of them where there are several."""
    parts: list[RenderableType] = []
    for plan in plans:
        parts.append(_one(plan))
        if "sizes" in plan:
            parts.append(_sizes(_name(plan), plan["sizes"]))
        if "stages" in plan:
            parts.append(_stages(plan))
            of_sizes = [each for each in plan["stages"] if "sizes" in each]
            parts += [_sizes(f"{_name(plan)}, stage {each['stage']}", each["sizes"]) for each in of_sizes]
    if len(plans) > 1:
        parts.append(_all(plans))
    known = [plan for plan in plans if {"step_seconds", "sizes", "stages"} & plan.keys()]
    if known:
        timed = ASSUMPTIONS if any("step_seconds" in plan for plan in plans) else ()
        others = dict.fromkeys(each for plan in known for each in plan["assumptions"] if each not in ASSUMPTIONS)
        parts.append("Assumed: " + "; ".join((*timed, *others)) + ".")
    return Group(*parts)


def _all(plans: list[Plan]) -> Table:
    table = Table(title="fastest to slowest step", title_justify="left")
    table.add_column()
    for plan in plans:
        table.add_column(_name(plan), justify="right")
    table.add_row("chips", *(str(plan["chips"]) for plan in plans))
    table.add_row("batch a device", *(f"{plan['batch_per_device']:g}" for plan in plans))
    table.add_row("memory a device", *(_of_hbm(plan["bytes_per_device"]) for plan in plans))
    if any("largest_batch" in plan for plan in plans):
        table.add_row("largest batch", *(f"{plan['largest_batch']['batch_per_device']:g}" for plan in plans))
    for name, key, form in _RATES:
        table.add_row(name, *(_range(plan, key, form) for plan in plans))
    return table


def _stages(plan: Plan) -> Table:
    """A row for each stage of a training."""
    title = f"{_name(plan)}, by stage; memory is that of the largest, hours are the sum, the rest above a mean by steps"
    table, rows = Table(title=title, title_justify="left"), plan["stages"]
    rates = [each for each in _RATES if all(each[1] in row for row in rows)]
    searched = ["largest batch"] * all("largest_batch" in row for row in rows)
    for column in ("stage", "steps", "batch", "memory a device", *searched, *(name for name, *_ in rates)):
        table.add_column(column, justify="right")
    table.add_column("compiled in", justify="right")
    for row in rows:
        table.add_row(
            str(row["stage"]),
            f"{row['steps']:,}",
            f"{row['global_batch_size']:g}",
            _of_hbm(row["bytes_per_device"]),
            *(f"{row['largest_batch']['global_batch_size']}" for _ in searched),
            *(_range(row, key, form) for _, key, form in rates),
            f"{row['compile_seconds']:.0f} s",
        )
    return table


def _sizes(name: str, rows: Sequence[dict[str, Any]]) -> Table:
    """A row for each size of pictures."""
    title = f"{name}, by the size of pictures; memory is that of the largest, the rest above a mean by steps"
    table = Table(title=title, title_justify="left")
    rates = [name for name, key, _ in _RATES if all(key in row for row in rows)]
    for column in ("size", "steps", "batch", "memory a device", *rates):
        table.add_column(column, justify="left" if column == "size" else "right")
    table.add_column("compiled in", justify="right")
    for row in rows:
        does_not_fit = ", does not fit" * (row["fits"] is False)
        table.add_row(
            row["size"],
            f"{row['share_of_steps']:.1%}",
            str(row["global_batch_size"]),
            _bytes(row["bytes_per_device"]) + does_not_fit,
            *(_range(row, key, form) for _, key, form in _RATES if key in row),
            f"{row['compile_seconds']:.0f} s",
        )
    return table


_RATES = (
    ("step, seconds", "step_seconds", "{:.3f}"),
    ("images a second", "images_per_second", "{:,.1f}"),
    ("MFU", "mfu", "{:.1%}"),
    ("hours", "hours", "{:,.1f}"),
    ("chip-hours", "chip_hours", "{:,.1f}"),
)


def _one(plan: Plan) -> Table:
    table = Table(title=_title(plan), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, value in _rows(plan):
        table.add_row(name, value)
    return table


def _rows(plan: Plan) -> list[tuple[str, str]]:
    memory, flops, seconds = plan["bytes_per_device"], plan["flops_per_device"], plan["seconds"]
    parameters = plan["parameters"]
    parts = ("params", "opt_state", "ema_params", "frozen", "batch", "temporary")
    rows = [
        ("mesh", "  ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())),
        ("batch", f"{plan['global_batch_size']}, {plan['batch_per_device']:g} a device"),
        ("parameters", f"{parameters['trained'] / 1e6:,.1f} M trained, {parameters['frozen'] / 1e6:,.1f} M frozen"),
        ("memory a device", _of_hbm(memory)),
        ("", "  ".join(f"{part} {_bytes(memory[part])}" for part in parts)),
    ]
    if "largest_batch" in plan:
        rows.append(("largest batch", _largest(plan["largest_batch"])))
    rows += [
        ("optimizer", f"{plan['optimizer_bytes_a_parameter']:.2g} bytes a trained parameter"),
        ("checkpoint", _bytes(plan["checkpoint_bytes"])),
        ("FLOPs a device", f"model {_count(flops['model'])}, compiled {_count(flops['compiled'])}"),
    ]
    for each in plan["collectives"]:
        devices = f", {each['devices']} devices" if each["devices"] else ""
        over = each["over"].upper() + devices
        rows.append((f"{each['kind']}", f"{each['count']:,} of {_bytes(each['bytes'])} in all, over {over}"))
    known = {name: value for name, value in seconds.items() if value is not None}
    if known:
        rows.append(("milliseconds", "  ".join(f"{name} {1e3 * value:,.1f}" for name, value in known.items())))
        shares = plan["seconds_by_part"].items()
        rows.append(("roofline of", "  ".join(f"{part} {1e3 * value:,.1f}" for part, value in shares)))
    rows += [(name, _range(plan, key, form)) for name, key, form in _RATES if key in plan]
    return rows


def _largest(largest: dict[str, Any]) -> str:
    if not largest["global_batch_size"]:
        return "not even the smallest fits"
    batch = f"{largest['global_batch_size']}, {largest['batch_per_device']:g} a device"
    return f"{batch}, which take {_bytes(largest['total'])} of each"


def _title(plan: Plan) -> str:
    compiled = plan["compiled"]
    how = "to the end" if compiled["is_full"] else "up to code generation"
    when = "cached, compiled" if compiled["is_cached"] else "compiled"
    return f"{_name(plan)}: {plan['chips']} chips ({when} {how} in {compiled['seconds']:.0f} s)"


def _name(plan: Plan) -> str:
    slices = plan["num_slices"]
    return f"{slices} x {plan['topology']}" if slices > 1 else plan["topology"]


def _of_hbm(memory: dict[str, Any]) -> str:
    if memory["hbm"] is None:
        return _bytes(memory["total"])
    if not memory["fits"]:
        return f"does not fit: needs {_bytes(memory['total'])} of {_bytes(memory['hbm'])}"
    return f"{_bytes(memory['total'])} of {_bytes(memory['hbm'])}"


def _range(plan: Plan, key: str, form: str) -> str:
    values = plan.get(key, ())
    texts = ["– (not known)" if value is None else form.format(value) for value in values]
    return " to ".join(dict.fromkeys(texts))


def _count(number: float) -> str:
    for unit in ("", " K", " M", " G"):
        if number < 1000:
            return f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:,.2f} T"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"
