"""Going back once (`train.roll_back`): a run that only skips steps returns to a checkpoint of before, and reads on.

Step t takes batch t - 1 up to the step that the run went back to, and batch t - 1 + n after it: n batches, those of the
steps that are undone, are left out. `rolled_back.json` says so before anything else changes, and so do the checkpoints
after it. A resume does the same, whenever the run was interrupted, and sets aside what was saved of the undone steps.
"""

import contextlib
import json
from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import Any

from etils import epath

from offsetjax.data.stream import Stream
from offsetjax.errors import UserError
from offsetjax.files import write_whole
from offsetjax.json_text import parse_object, signed
from offsetjax.parallel import processes
from offsetjax.storage import digests
from offsetjax.storage.checkpoint import UnreadableError
from offsetjax.storage.retry import retried

_FILE, _KEY = "rolled_back.json", "rolled_back"


@dataclass(frozen=True)
class RollBack:
    """To which step a run went back, and how many batches it left out then; none, by default."""

    to: int = 0
    left_out: int = 0

    def __bool__(self) -> bool:
        return self.left_out > 0

    def batch_of(self, step: int) -> int:
        """The number of the batch that a step takes."""
        return step - 1 + (self.left_out if step > self.to else 0)

    def batches(self, stream: Stream, start: int) -> Generator[dict[str, Any], None, None]:
        """The batches of the steps after `start`, or their parts; to be closed, as those of the stream."""
        if start < self.to:
            with contextlib.closing(stream.iterator(start)) as before:
                yield from (next(before) for _ in range((self.to - start) * stream.parts))
        with contextlib.closing(stream.iterator(max(start, self.to) + self.left_out)) as after:
            yield from after

    def noted(self, step: int) -> dict[str, Any]:
        """What the checkpoint of a step says of it."""
        return {_KEY: asdict(self)} if self and step > self.to else {}

    def check(self, step: int, data: dict[str, Any]) -> None:
        """Raises an UnreadableError where what was saved of a step is of those that were undone."""
        if self and step > self.to and data.get(_KEY) != asdict(self):
            raise UnreadableError(f"checkpoint: step {step} was undone: the run went back to step {self.to}")


def read(workdir: epath.Path) -> RollBack:
    """What a run has noted.

    Raises:
        UserError: the note cannot be read; another would be another order of the data.
    """
    file = workdir / _FILE
    if not file.exists():
        return RollBack()
    try:
        stored = digests.check_json(parse_object(retried(file.read_bytes, str(file))), f"workdir: {file}")
        found = RollBack(**stored)
        if not all(type(each) is int and each > 0 for each in (found.to, found.left_out)):
            raise ValueError("no steps")
    except (ValueError, TypeError) as error:
        raise UserError(f"workdir: {file} is damaged; restore it from a copy") from error
    return found


def write(workdir: epath.Path, rolled_back: RollBack) -> None:
    """Notes it, before the first of several processes lets the others go on."""
    if processes.is_first():
        write_whole(workdir / _FILE, json.dumps(signed(asdict(rolled_back))) + "\n")
    processes.barrier("where the run goes back to is written")


def before(steps: list[int], first_skipped: int, last: int) -> RollBack:
    """Back to the newest of the saved steps before the first that was skipped, leaving out what came up to the last."""
    to = max((step for step in steps if step < first_skipped), default=0)
    return RollBack(to, last - to) if to else RollBack()
