"""The command `offsetjax`, and `python -m offsetjax`: signals are heard before anything else is imported."""

import os
import select
import signal
import sys
from types import FrameType

import offsetjax


def main() -> int:
    """Runs the command line; see `cli.main`."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    offsetjax.is_program = True
    from offsetjax.cli import main

    return main()


def _end(number: int, frame: FrameType | None) -> None:
    """Nothing is begun yet. `parallel.signals` takes over as soon as it is there."""
    try:
        poll = select.poll()
        poll.register(2, select.POLLOUT)
        if poll.poll(1000):  # a reader that has stopped is not waited for
            os.write(2, f"offsetjax: ended by {signal.Signals(number).name}, with nothing to save\n".encode())
    finally:
        os._exit(130 if number == signal.SIGINT else 143)


if __name__ == "__main__":
    sys.exit(main())
