"""Errors meant for users: what was given, what the rule is, what to do."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend. The commands print its message without a traceback and exit with 2."""


class LostRankError(RuntimeError):
    """Another process of the run is gone or hangs. The commands print the message and exit with 1."""


def nearest(name: object, options: Iterable[object]) -> str:
    """Return `` Did you mean 'x'?`` for the option most like ``name``, or an empty string.

    It is meant to be appended to a message that lists the options.
    """
    close = difflib.get_close_matches(str(name), [str(option) for option in options], n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def choose(what: str, name: object, options: Iterable[object]) -> str:
    """Compose the message for a name that is none of ``options``: value, options and the nearest one."""
    names = [str(option) for option in options]
    return f"{what}={name} is not known.{nearest(name, names)} Options: {', '.join(names)}."
