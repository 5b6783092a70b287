"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake in the configuration, the data, a checkpoint or a path.

    Its text is one line: what is wrong, where, and the remedy. The command line prints it and exits with status 2.
    """
