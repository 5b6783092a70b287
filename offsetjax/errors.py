"""The exceptions that end a program as they should: the user's to mend, or for the scheduler to start again."""


class UserError(Exception):
    """A mistake in the configuration, the data, a checkpoint or a path.

    Its text is one line: what is wrong, where, and the remedy. The command line prints it and exits with status 2.
    """


class PreemptedError(Exception):
    """SIGTERM came, to any of the processes: all have saved the same step. The command line exits with status 143."""


def one_line(error: BaseException, most: int = 200) -> str:
    """What another library's exception says, in one line of at most so many characters; if nothing, its kind."""
    return " ".join(str(error).split())[:most] or type(error).__name__
