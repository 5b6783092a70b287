"""Functions called in processes of their own: alone, to measure what they cost, or as the processes of one training."""

import gc
import multiprocessing
import os
import pathlib
import socket
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax

from tests.compilation import QUICK_COMPILATION


def call(function: Callable[..., Any], *arguments: Any, num_devices: int = 1, seconds: float = 300) -> Any:
    """What a function gives in another process."""
    [result] = call_together([(function, *arguments)], num_devices, seconds)
    return result


def call_together(calls: Sequence[tuple[Any, ...]], num_devices: int, seconds: float = 300) -> list[Any]:
    """What functions give, each in a process of its own; several are one training's, on `num_devices` each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    context, started = multiprocessing.get_context("spawn"), []
    try:
        for index, function_and_arguments in enumerate(calls):
            ours, theirs = context.Pipe()
            place = (address, len(calls), index) if len(calls) > 1 else None
            process = context.Process(target=_serve, args=(theirs, num_devices, place, *function_and_arguments))
            process.start()
            theirs.close()
            started.append((process, ours))
        results = []
        for _, connection in started:
            assert connection.poll(seconds), f"no result after {seconds} s"
            result, error = connection.recv()
            assert not error, error
            results.append(result)
        return results
    finally:
        for process, _ in started:
            process.kill()
            process.join()


def _serve(connection: Any, num_devices: int, place: Any, function: Callable[..., Any], *arguments: Any) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", num_devices)
    for name, value in QUICK_COMPILATION.items():
        jax.config.update(name, value)
    try:
        if place:
            jax.distributed.initialize(*place, initialization_timeout=60)
        result = function(*arguments)
        if place:  # the first process is what the others hold on to
            jax.distributed.shutdown()
        connection.send((result, ""))
    except BaseException:
        connection.send((None, traceback.format_exc()))
    connection.close()
    os._exit(0)  # what else is done at an exit waits for the other process


def memory(field: str) -> int:
    """Bytes of this process, by a field of /proc/self/status: VmRSS now, VmHWM at most since `most_growth` began."""
    line = next(line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def most_growth(function: Callable[[], Any]) -> tuple[Any, int]:
    """What a function gives, and how much more memory than before this process had at the most meanwhile."""
    gc.collect()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is now
    before = memory("VmRSS")
    result = function()
    jax.block_until_ready(result)
    return result, memory("VmHWM") - before
