"""A run is not lost: it resumes from the newest step that is good, and never begins again in silence."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from offsetjax.cli import main
from offsetjax.errors import StorageError, TransientError, UserError
from offsetjax.storage import checkpoint, digests, record, retry
from offsetjax.train import train
from offsetjax.training.setup import settled
from offsetjax.training.states import refuse_to_begin_again
from tests import tiny
from tests.launch.pod import steps_of

# Orbax leaves behind the reads of a step's other arrays, which complain when they end.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    """A copy of a finished training of 6 steps, with checkpoints of 2, 4 and 6, in a folder with a name of its own."""
    return shutil.copytree(tiny.trained_workdir(base), tmp_path / "hash#1 %41 é")


def _resume(base: Path, run: Path, **changes: Any) -> None:
    with tiny.quick_compilation(base):
        train(tiny.run_config(tiny.data_path(base), **changes), run)


def _weights(run: Path, step: int) -> dict[str, int]:
    return json.loads((run / "checkpoints" / str(step) / "data" / "metadata").read_text())["checksums"]


def _flip(file: Path, place: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 4
    file.write_bytes(content)


def _flip_an_array(run: Path, step: int = 6) -> None:
    """A bit in the middle of each file of arrays."""
    for file in (run / "checkpoints" / str(step) / "state").rglob("d/*"):
        _flip(file)


def _flip_the_fingerprint(run: Path) -> None:
    file = run / "checkpoints" / "6" / "data" / "metadata"
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1'))


def test_a_damaged_newest_step_falls_back_to_the_one_before(
    base: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = _weights(run, 6)
    losses = steps_of(run)
    damages = (_flip_an_array, _flip_the_fingerprint)
    for number, damage in enumerate(damages, 1):
        caplog.clear()
        damage(run)
        _resume(base, run)
        assert _weights(run, 6) == whole, damage
        assert steps_of(run) == losses
        [warning] = [each.message for each in caplog.records if "is kept as" in each.message]
        assert "checkpoints/6" in warning and "step 4 is resumed" in warning
        assert len(list((run / checkpoint.ASIDE).iterdir())) == number  # nothing is deleted
    assert record.newest_saved(run) == 6


def test_a_mistake_is_found_before_the_state_is_read(base: Path, run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "6" / "state")
    with pytest.raises(UserError, match=r"seed is 1, but the checkpoint was written with 0|seed = 1, but .* was begun"):
        _resume(base, run, seed=1)
    assert not (run / checkpoint.ASIDE).exists()


def test_a_lost_read_is_tried_again_and_is_no_damage(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retry, "WAITS", (0.0, 0.0))
    failures = [1]

    class Failing:
        def restore(self, *arguments: Any, **options: Any) -> Any:
            if failures and failures.pop():
                raise ValueError("UNAVAILABLE: Error reading gs://b: HTTP response code: 503")
            return {}

    with checkpoint.open_checkpoints(run) as manager:
        monkeypatch.setattr(checkpoint, "_state_handler", Failing)
        assert checkpoint._read_state(manager, 6, {}, {}) == {}
        assert "trying again" in caplog.text
        failures += [1] * 9
        with pytest.raises(TransientError, match=r"checkpoints/6: UNAVAILABLE.*; tried 3 times"):
            checkpoint._read_state(manager, 6, {}, {})
    assert (run / "checkpoints" / "6").exists()


@pytest.mark.parametrize("is_noted", [True, False])
def test_a_run_without_its_checkpoints_never_begins_again(base: Path, run: Path, is_noted: bool) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    for step in (run / "checkpoints").iterdir():
        shutil.rmtree(step)
    if not is_noted:  # as runs of before have no record of their saves
        (run / "saved.json").unlink()
    with pytest.raises(UserError, match=r"has no step, but .* was trained to step 6; restore it from a copy"):
        _resume(base, run)
    (run / "config.json").unlink()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match=r"has been trained but has no config\.json"):
        _resume(base, run)
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("is_readable", [True, False])
def test_saved_json_alone_tells_of_a_run_that_must_not_begin_again(is_readable: bool, tmp_path: Path) -> None:
    """The config, the checkpoints and the log are gone: a partial copy, or a bucket's rule that ages files out."""
    run = tmp_path / "run"
    run.mkdir()
    text = json.dumps(digests.signed({"step": 500}))
    (run / "saved.json").write_text(text if is_readable else text[:9])
    with pytest.raises(UserError, match=r"has been trained but has no config\.json; restore it"):
        settled(tiny.tiny_config(), epath.Path(run), source=None)


@pytest.mark.parametrize("is_noted", [True, False])
def test_steps_before_the_first_checkpoint_are_made_again_and_that_is_told(
    is_noted: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may have been on its way; or its save failed, where the run has noted that none was made."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 9, "loss": 1.0}\n')
    if is_noted:
        record.note_begun(tmp_path)
    refuse_to_begin_again(epath.Path(tmp_path), every_steps=2 if is_noted else 5)
    assert "has no checkpoint yet: its 9 steps so far are made again" in caplog.text
    assert not record.has_saved(tmp_path)
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    assert not record.has_saved(tmp_path)
    (tmp_path / "checkpoints" / "2").mkdir()
    assert record.has_saved(tmp_path)


def test_every_step_that_cannot_be_read_is_named_and_none_is_to_be_moved(base: Path, run: Path) -> None:
    for step in (2, 4, 6):
        _flip_an_array(run, step)
    with pytest.raises(UserError) as raised:
        _resume(base, run)
    text = str(raised.value)
    assert all(f"checkpoints/{step} cannot be read" in text for step in (2, 4, 6))
    assert "move" not in text and "remove" not in text and "delete" not in text


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("frozen/tokenizer/merges.txt", r"merges\.txt is (damaged|not whole)"),
        ("frozen/tokenizer/tokenizer_config.json", "tokenizer_config.json is damaged|cannot be read"),
        ("frozen/checksums.json", "checksums.json is damaged"),
        ("frozen/vae/config.json", "config.json is damaged"),
        ("config.json", "config.json is damaged|is no config|must be|unknown key|is not of"),
    ],
)
def test_every_file_that_a_run_reads_again_is_compared(
    run: Path, file: str, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (run / file).write_bytes((run / file).read_bytes().replace(b"1", b"3", 1).replace(b"l", b"m", 1))
    assert main(["sample", f"--workdir={run}", "--prompt=a", f"--out={tmp_path}/out"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(words, err), err


@pytest.mark.parametrize("file", ["frozen/tokenizer/merges.txt", "frozen/checksums.json", "frozen/tokenizer"])
def test_a_file_that_is_gone_is_missed(
    run: Path, file: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (shutil.rmtree if (run / file).is_dir() else Path.unlink)(run / file)
    assert main(["sample", f"--workdir={run}", "--prompt=a", f"--out={tmp_path}/out"]) == 2
    assert re.search("(is missing|lacks a tokenizer); restore it from a copy", capsys.readouterr().err)


def test_a_folder_without_digests_is_told(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "frozen" / digests.FILE).unlink()
    digests.check(run / "frozen")
    assert "digests.json is missing: what lies beside it is not checked" in caplog.text


def test_a_disk_that_cannot_hold_a_checkpoint_is_told_before_training(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "room_of", lambda workdir: 5000)
    with pytest.raises(StorageError, match=r"new: a checkpoint takes .* [kM]B, but 5 kB are free; make room"):
        _resume(base, tmp_path / "new")


def test_checkpoints_are_listed_verified_and_pruned(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "list", f"--workdir={run}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["2", "4", "6"]
    assert main(["checkpoint", "verify", f"--workdir={run}"]) == 0
    assert capsys.readouterr().out.count("good") == 3
    _flip_an_array(run)
    assert main(["checkpoint", "verify", f"--workdir={run}"]) == 2
    captured = capsys.readouterr()
    assert captured.out.count("good") == 2 and "cannot be read" in captured.out
    assert main(["checkpoint", "prune", f"--workdir={run}", "--keep=1"]) == 2  # the newest is not good
    assert "step 6 cannot be read" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints" / "6")
    assert main(["checkpoint", "prune", f"--workdir={run}", "--keep=1"]) == 0
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["4"]
