"""Signals, from the first line of the program on: SIGTERM, SIGHUP, SIGQUIT and SIGINT (Ctrl-C).

A thread reads them from a pipe, and calls who listens. Python's own handlers wait while the program compiles or waits
for a device, and what they raise is lost in a destructor, or breaks an import; here they do nothing. A signal that the
program was started to ignore, as by `nohup`, stays ignored. Nothing of JAX is imported here.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from offsetjax import log
from offsetjax.errors import Status

HEARD = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT)
_SAME_SIGNAL_SECONDS = 1.0  # a launcher may pass on what its process group has got already
_PARENT = "OFFSETJAX_PARENT"  # the environment's: the number of the process without which this one is to end


@dataclass(frozen=True)
class Listener:
    """What happens at the first signal of a kind, and at a second one; both are called in the thread that hears."""

    first: Callable[[int], None]
    second: Callable[[int], None]


class Interrupted(KeyboardInterrupt):
    """A signal came, inside of `raised`."""

    def __init__(self, number: int) -> None:
        super().__init__(name(number))
        self.number = number


class _Program:
    """The signals of this program. They are one thing, wherever it hears them."""

    def __init__(self) -> None:
        self.listeners: list[Listener] = []
        self.pipe: int | None = None  # to which Python writes the numbers of signals
        self.raises = False

    def handle(self, number: int, frame: Any) -> None:
        if self.raises:
            self.raises = False
            raise Interrupted(number)

    def hear(self, read: int) -> None:
        heard: dict[int, float] = {}
        for number in iter(lambda: int.from_bytes(os.read(read, 1), sys.byteorder), 0):
            if number not in HEARD:
                continue
            is_first = number not in heard
            if is_first:
                heard[number] = time.monotonic()
            elif time.monotonic() - heard[number] <= _SAME_SIGNAL_SECONDS:
                continue
            try:
                (self.listeners[-1].first if is_first else self.listeners[-1].second)(number)
            except BaseException as error:  # this thread has to hear the next one
                log.say(f"{name(number)}: {type(error).__name__}: {error}")
        os.close(read)


_program = _Program()


def name(number: int) -> str:
    """`15 -> "SIGTERM"`."""
    return signal.Signals(number).name


def status_of(number: int) -> Status:
    """The exit status of a program that a signal has ended: Ctrl-C is the user's, the others are a scheduler's."""
    return Status.INTERRUPTED if number == signal.SIGINT else Status.PREEMPTED


def end(status: int, why: str, stacks: str = "") -> NoReturn:
    """Ends this process at once, its children too: what Python does at its end might wait for others."""
    for child in multiprocessing.active_children():
        child.kill()
    if why:
        log.say(why)
    log.write(stacks)
    flushing = threading.Thread(target=log.close_output, daemon=True)
    flushing.start()
    flushing.join(1.0)  # whoever reads it may have stopped
    pause(status)
    os._exit(status)


def listener(end: Callable[[int, str], None], first: Callable[[int], None] | None = None) -> Listener:
    """Who ends all by `end(status, why)`: at the second signal, and where `first` is None at the first, with nothing
    to save."""

    def end_with_nothing(number: int) -> None:
        end(status_of(number), ended_with_nothing(number))

    def end_at_once(number: int) -> None:
        end(status_of(number), "a second signal: ended at once, nothing more is saved")

    return Listener(first or end_with_nothing, end_at_once)


def pause(status: int) -> None:
    """Waits before a process ends that is started again at once, where its launcher asks for that (Kubernetes)."""
    seconds = os.environ.get("OFFSETJAX_PAUSE_SECONDS", "")
    if status == Status.TRANSIENT and seconds.isdecimal():
        time.sleep(min(int(seconds), 3600))


def ended_with_nothing(number: int) -> str:
    """The line for a program that a signal ends while there is nothing to save."""
    return f"ended by {name(number)}, with nothing to save"


@contextlib.contextmanager
def heard(by: Listener, to_the_end: bool = False) -> Iterator[None]:
    """Inside, signals come to a listener; contexts nest, and the innermost listens.

    Outside of the main thread, in which alone Python sets handlers, only a context around this one can hear.

    Args:
        to_the_end: of the program: its handlers stay while Python ends.
    """
    _program.listeners.append(by)
    try:
        with contextlib.nullcontext() if _program.pipe is not None else _handlers(to_the_end):
            yield
    finally:
        if not to_the_end:
            _program.listeners.pop()


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Inside, the first signal raises `Interrupted` in the main thread, where signals are heard: what is half written
    is then cleared away."""
    before = _program.raises
    _program.raises = _program.pipe is not None
    _program.listeners.append(Listener(lambda number: None, listener(end).second))
    try:
        yield
    finally:
        _program.listeners.pop()
        _program.raises = before


def claim() -> None:
    """Takes the signals back from a library that has set handlers of its own, as those of accelerators may."""
    if _program.pipe is None or threading.current_thread() is not threading.main_thread():
        return
    for number in HEARD:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _program.handle)


@contextlib.contextmanager
def _handlers(to_the_end: bool) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, _program.pipe = os.pipe()
    os.set_blocking(_program.pipe, False)
    before = {number: signal.getsignal(number) for number in HEARD}
    descriptor = signal.set_wakeup_fd(_program.pipe, warn_on_full_buffer=False)
    claim()
    threading.Thread(target=_program.hear, args=(read,), daemon=True, name="offsetjax signals").start()
    if parent := os.environ.get(_PARENT, ""):
        threading.Thread(target=_follow, args=(parent,), daemon=True, name="offsetjax parent").start()
    try:
        yield
    finally:
        if not to_the_end:
            signal.set_wakeup_fd(descriptor)
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            os.close(_program.pipe)
            _program.pipe = None


@functools.cache
def end_with_parent() -> None:
    """Of a helper process, such as a reader of data: it ends when the process that started it has, however that was."""
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_outlive, args=(parent,), daemon=True, name="offsetjax parent").start()


def _outlive(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _follow(parent: str) -> None:
    """Ends the program as by SIGTERM once its parent has gone, which was killed and could not end it."""
    while str(os.getppid()) == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)
