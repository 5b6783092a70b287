"""Compiles a config's train step for a topology in a process of its own, as far as planning needs, and remembers it.

A TPU's compiler takes most of its time for generating code. What a plan needs, the optimised and scheduled program and
the memory that it takes, stands in files that the compiler writes on request before that: they are read as soon as they
are whole, and the process is ended.
"""

import gzip
import importlib.util
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ml_collections import ConfigDict

from offsetjax.config import to_json
from offsetjax.data.buckets import Size
from offsetjax.errors import UserError
from offsetjax.json_text import parse_object
from offsetjax.leftovers import temporary_prefix
from offsetjax.parallel.chips import CHIPS, chip_named

_OPTIMISED = "*after_optimizations.txt"
_ALLOCATIONS = "*buffer-assignment.txt"
_AFTER_THEM = "*buffer-assignment-values.txt"  # of a program with loops several GB, which nobody waits for
_OUT_OF_MEMORY = "*oom_intermediate_module.txt"
_USAGE = "*memory-usage-report.txt"
_POLL_SECONDS = 0.5

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What is to be compiled.

    Attributes:
        topology: such as `v5e:4x4`, or `cpu:8` for so many virtual devices of this machine.
        is_full: also generate the code, after which the compiler knows the cycles of each operation.
        cache_dir: where what has been compiled is kept.
        size: of the pictures, where there are several; None: squares.
        count: examples of a batch of that size; None: `train.global_batch_size`.
    """

    config: ConfigDict
    topology: str
    num_slices: int
    is_full: bool
    cache_dir: Path
    size: Size | None = None
    count: int | None = None


@dataclass(frozen=True)
class Compiled:
    """A compiled step.

    Attributes:
        facts: what `worker._facts` says of it.
        hlo: the text of the optimised program, of one device.
        hbm_bytes: all that it takes of a device's memory.
        hbm_limit_bytes: what there is, where the program did not fit and the compiler said so.
        seconds: that it took to compile, when that was done.
        is_cached: whether that was done before.
    """

    facts: dict[str, Any]
    hlo: str
    hbm_bytes: int
    hbm_limit_bytes: int | None
    seconds: float
    is_cached: bool


def check_topology(topology: str, num_slices: int) -> None:
    """Checks a topology's name, and that there is a compiler for it.

    Raises:
        UserError: it is none, or libtpu is missing.
    """
    generation, _, shape = topology.partition(":")
    if generation == "cpu":
        if not re.fullmatch(r"[1-9]\d{0,2}", shape):
            raise UserError(f"plan: --topology={topology} is none: cpu:8 are 8 virtual devices of this machine")
        if num_slices > 1:
            raise UserError(f"plan: --num_slices={num_slices} cannot apply to {topology}; leave it out")
        return
    chip = chip_named(generation)
    if chip is None:
        known = ", ".join(each.examples[min(2, len(each.examples) - 1)] for each in CHIPS if each.name)
        raise UserError(f"plan: --topology={topology} is none; give one such as {known} or cpu:8")
    if not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise UserError(f"plan: --topology={topology} has no shape; some that can be had: {', '.join(chip.examples)}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "plan: libtpu, the compiler for TPUs, is not installed; `pip install 'offsetjax[tpu]'` brings it"
        )


def compile_step(request: Request, progress: Progress) -> Compiled:
    """Compiles, or recalls, a config's train step.

    Args:
        progress: is called again and again with what is being done.

    Raises:
        UserError: the config does not go with the topology.
        RuntimeError: the compiler failed for a reason of its own; its last words are in the message.
    """
    with (
        tempfile.TemporaryDirectory(prefix=temporary_prefix("plan")) as dump_dir,
        _Worker(request, Path(dump_dir)) as worker,
    ):
        facts, phase, begin = {}, "starting", time.monotonic()
        while True:
            progress(phase)
            message = worker.next_message()
            if "phase" in message:
                phase, begin = message["phase"], time.monotonic()
            if "facts" in message:
                facts = message["facts"]
                if (entry := request.cache_dir / f"{facts['key']}.json").exists():
                    return _recall(facts, entry)
            if "user_error" in message:
                raise UserError(message["user_error"])
            if found := _result(message, Path(dump_dir), request):
                hlo, hbm_bytes, limit = found
                compiled = Compiled(facts, hlo, hbm_bytes, limit, round(time.monotonic() - begin, 1), False)
                _remember(compiled, request.cache_dir)
                return compiled
            if message.get("ended"):
                raise RuntimeError(f"plan: compiling for {request.topology} failed: {worker.last_words()}")


def _result(message: dict[str, Any], dump_dir: Path, request: Request) -> tuple[str, int, int | None] | None:
    """The program's text, its bytes and the limit that it exceeds, once the files are whole."""
    if "does_not_fit" in message:
        needs, limit = _exceeded(message["does_not_fit"])
        return _read(dump_dir, _OUT_OF_MEMORY) or "", _usage(dump_dir) or needs, limit
    if "compiled" in message:
        return (dump_dir / "compiled.txt").read_text(), _usage(dump_dir) or message["compiled"], None
    allocated = _allocated(dump_dir)
    if request.is_full or allocated is None or not (hlo := _read(dump_dir, _OPTIMISED)):
        return None
    return hlo, allocated, None


def _read(dump_dir: Path, pattern: str) -> str | None:
    """A file of the compiler's, if it is there and whole."""
    file = next(dump_dir.glob(pattern), None)
    if file is None:
        return None
    size = file.stat().st_size
    time.sleep(_POLL_SECONDS)
    text = file.read_text()
    is_whole = size == file.stat().st_size and text.rstrip().endswith("}") and "\nENTRY " in text
    return text if is_whole else None


def _allocated(dump_dir: Path) -> int | None:
    """Bytes of HBM, from the list of allocations, once it is whole."""
    file = next(dump_dir.glob(_ALLOCATIONS), None)
    if file is None or not any(dump_dir.glob(_AFTER_THEM)):
        return None
    allocations = re.findall(r"^allocation \d+: size (\d+)(.*)", file.read_text(errors="replace"), re.MULTILINE)
    return sum(int(size) for size, what in allocations if not re.search(r"\bcolor [1-9]", what))


def _usage(dump_dir: Path) -> int | None:
    """Bytes of HBM, from the compiler's report."""
    file = next(dump_dir.glob(_USAGE), None)
    found = re.search(r"Memory Space: default.*\nTotal bytes: (\d+) ", file.read_text()) if file else None
    return int(found[1]) if found else None


def _exceeded(message: str) -> tuple[int, int | None]:
    """What the compiler says that is needed, and what there is."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    sizes = [int(float(size) * units[unit]) for size, unit in re.findall(r"(\d+(?:\.\d+)?)([KMGT])\b", message)]
    return (sizes[0] if sizes else 0), (sizes[1] if len(sizes) > 1 else None)


def _remember(compiled: Compiled, cache_dir: Path) -> None:
    cache_dir.mkdir(parents=True, exist_ok=True)
    key = compiled.facts["key"]
    with tempfile.NamedTemporaryFile(dir=cache_dir, delete=False) as file:
        file.write(gzip.compress(compiled.hlo.encode(), 3))
    Path(file.name).replace(cache_dir / f"{key}.hlo.gz")
    kept = {name: getattr(compiled, name) for name in ("hbm_bytes", "hbm_limit_bytes", "seconds")}
    with tempfile.NamedTemporaryFile("w", dir=cache_dir, delete=False) as text:
        text.write(json.dumps(kept) + "\n")
    Path(text.name).replace(cache_dir / f"{key}.json")  # last: what has it is whole


def _recall(facts: dict[str, Any], entry: Path) -> Compiled:
    hlo = gzip.decompress(entry.with_suffix(".hlo.gz").read_bytes()).decode()
    return Compiled(facts, hlo, is_cached=True, **parse_object(entry.read_bytes()))


class _Worker:
    """The process that compiles; it ends with the block, and with this process."""

    def __init__(self, request: Request, dump_dir: Path):
        self._asked = {
            "config": to_json(request.config),
            "topology": request.topology,
            "num_slices": request.num_slices,
            "is_full": request.is_full,
            "size": request.size,
            "count": request.count,
            "cache_dir": str(request.cache_dir),
            "dump_dir": str(dump_dir),
        }
        self._errors = dump_dir / "stderr"
        self._messages: queue.Queue[dict[str, Any]] = queue.Queue()

    def __enter__(self) -> "_Worker":
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",  # where there are TPUs, they are left to others
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        with self._errors.open("wb") as errors:  # libtpu complains of what it cannot know without a TPU
            self._process = subprocess.Popen(
                [sys.executable, "-m", "offsetjax.plan.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(self._asked) + "\n")
        self._process.stdin.flush()
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()
        return self

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            if line.startswith("{"):
                self._messages.put(parse_object(line))
        self._messages.put({"ended": True})

    def next_message(self) -> dict[str, Any]:
        """The next thing that the process says; an empty one where it has said nothing for a while."""
        try:
            return self._messages.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            return {}

    def last_words(self) -> str:
        """The end of what it wrote to its standard error: the traceback, where there is one."""
        text = self._errors.read_text(errors="replace").strip()
        begin = max(0, text.rfind("Traceback (most recent call last)"))
        return f"exit status {self._process.wait()}; {text[begin:][-4000:]}"

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
