"""Several processes that train as one: how they find each other, and how they end together.

On TPUs JAX finds the processes by itself. Elsewhere three variables of the environment name them:
JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID; without them a process trains
alone. Whoever fails broadcasts that through the store of JAX's coordination service, and all end with the same status:
none waits for one that is gone. Each acts first and prints afterwards: what is printed may be lost.
"""

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from offsetjax import log
from offsetjax.errors import PreemptedError, TransientError, UserError, kind_of, one_line
from offsetjax.parallel import private, signals

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_HEARTBEAT_SECONDS = 100  # JAX's own: whoever is silent for as long is lost, and JAX aborts the others
_JOINING_HEARTBEATS = 3  # JAX's own: for as many of them the others are waited for at the start
_ENDED = "offsetjax/ended"
_LISTENER = "offsetjax listener"
_ending = threading.Lock()  # whoever has it ends this process
_DAY_MS, _BARRIER_MS = 86_400_000, 60_000


@contextlib.contextmanager
def together(report: Callable[[BaseException], object]) -> Iterator[None]:
    """Inside, all processes work as one; to be entered before anything else of JAX is used.

    An exception in one of them ends all, with the status of its kind; `report` says so to the user. A signal ends all
    too, where no other listener saves something first.

    Raises:
        UserError: variables that name no processes.
        TransientError: the others are not there.
    """
    _join()
    # Without a handler a container's process 1 would not hear SIGTERM.
    with signals.heard(signals.listener(abort)), _ended_together(report):
        yield


@contextlib.contextmanager
def _ended_together(report: Callable[[BaseException], object]) -> Iterator[None]:
    if not are_several():
        yield
        return
    subscribe(_ENDED, _end_too)
    try:
        yield
    except PreemptedError:  # all are, and at the same step
        _leave()
        raise
    except BaseException as error:
        abort(kind_of(error), one_line(error, most=2000), report=partial(report, error))
    _leave()


def are_several() -> bool:
    """Whether this process works with others."""
    return private.distributed().client is not None and private.distributed().num_processes > 1


def _client() -> Any:
    return private.distributed().client


def _index() -> int:
    return private.distributed().process_id


def subscribe(key: str, action: Callable[[str], None]) -> None:
    """Calls `action`, in a thread of its own, with what any process sends under `key`."""

    def listen() -> None:
        while True:
            try:
                sent = _client().blocking_key_value_get(key, _DAY_MS)
                break
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):  # all leave, or the service is gone: JAX sees to that
                    return
        action(sent)

    threading.Thread(target=listen, daemon=True, name=_LISTENER).start()


def broadcast(key: str, value: str) -> None:
    """Sends to all processes, this one too."""
    _client().key_value_set(key, value, allow_overwrite=True)


def gather(key: str, value: str) -> list[str]:
    """The values of all processes, once all have given theirs."""
    broadcast(f"{key}/{_index()}", value)
    _client().wait_at_barrier(key, _BARRIER_MS)
    return [value for _, value in _client().key_value_dir_get(key)]


def publish(key: str, value: str) -> list[str]:
    """Gives a value of this process's, and what each process has given last; nobody is waited for."""
    broadcast(f"{key}/{_index()}", value)
    return [value for _, value in _client().key_value_dir_get(key)] if _index() == 0 else [value]


def is_first() -> bool:
    """Whether this is the process that writes what one of them has to."""
    return jax.process_index() == 0


def all_of(is_so: bool) -> bool:
    """Whether it is so on all processes, which all have to ask."""
    if jax.process_count() == 1:
        return is_so
    return bool(np.all(multihost_utils.process_allgather(np.array(is_so))))


def differing(value: str) -> list[int]:
    """The processes whose value is not that of the first one, which all have to ask."""
    if jax.process_count() == 1:
        return []
    digests = multihost_utils.process_allgather(np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8))
    return [index for index, digest in enumerate(digests) if (digest != digests[0]).any()]


def barrier(where: str) -> None:
    """Waits until all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def abort(status: int, why: str, *, report: Callable[[], object] | None = None, shows_stacks: bool = False) -> NoReturn:
    """Ends all processes at once; what is not written yet is lost. Who calls it first decides how.

    Args:
        report: says it to the user, in the place of a line that says why.
        shows_stacks: each prints what all of its threads do.
    """
    if not _ending.acquire(blocking=False):
        threading.Event().wait()
    if are_several():
        text = f"{_index()} {int(status)} {int(shows_stacks)} {why}"
        telling = threading.Thread(target=_broadcast_quietly, args=(_ENDED, text), daemon=True)
        telling.start()
        telling.join(5)  # the service may be what is gone
    if report:
        with contextlib.suppress(BaseException):
            report()
    _end(status, "" if report else why, shows_stacks)


def _broadcast_quietly(key: str, value: str) -> None:
    with contextlib.suppress(Exception):
        broadcast(key, value)


def _end(status: int, why: str, shows_stacks: bool) -> NoReturn:
    """Ends this process at once: what Python does at its end would wait for the others."""
    stacks = log.stacks() if shows_stacks else ""
    if private.distributed().service is not None:
        time.sleep(1)  # the store ends with this process: the others have to read it, and to end, first
    signals.end(status, why, stacks)


def _end_too(sent: str) -> None:
    index, status, shows_stacks, why = sent.split(" ", 3)
    if int(index) != _index() and _ending.acquire(blocking=False):
        _end(int(status), f"ended, as process {index} was: {why}", bool(int(shows_stacks)))


def _leave() -> None:
    """Waits for the others, and for the listeners: Python must not end while threads of its are inside of JAX."""
    jax.distributed.shutdown()
    for thread in threading.enumerate():
        if thread.name == _LISTENER:
            thread.join()


def _join() -> None:
    settings = _settings()
    if settings is None:
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from `parallel.signals`
    seconds = int(os.environ.get("OFFSETJAX_HEARTBEAT_SECONDS", _HEARTBEAT_SECONDS))  # for tests
    try:
        jax.distributed.initialize(
            **settings, heartbeat_timeout_seconds=seconds, initialization_timeout=_JOINING_HEARTBEATS * seconds
        )
    except Exception as error:  # JAX raises several kinds
        raise TransientError(
            f"the other processes are not there ({one_line(error)}); to train on this machine alone, set "
            "JAX_NUM_PROCESSES=1"
        ) from error


def _settings() -> dict[str, Any] | None:
    """What JAX needs to find the others; None for a process that works alone."""
    if os.environ.get("JAX_NUM_PROCESSES") == "1":
        return None
    given = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    if not given:
        is_tpu = private.is_cloud_tpu_vm() and "tpu" in os.environ.get("JAX_PLATFORMS", "tpu")
        return {} if is_tpu else None
    for name in _VARIABLES:
        if name not in given:
            raise UserError(f"environment: {next(iter(given))} is set but not {name}; set both, or neither")
    address, count, index = given.values()
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise UserError(
            f"environment: JAX_PROCESS_ID = {index} of JAX_NUM_PROCESSES = {count}: expected a number below the other"
        )
    return {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)} | {
        "cluster_detection_method": "deactivate"
    }
