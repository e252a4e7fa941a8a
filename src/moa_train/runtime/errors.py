"""Errors for users. A message states what was given, what is allowed, and what to do."""

import difflib
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """Report a problem that the user can fix. Commands print the message without a traceback and exit with code 2."""


class LostRankError(RuntimeError):
    """Report that another process of the run has exited or hangs. Commands print the message and exit with code 1."""


def check_all(checks: Iterable[Callable[[], object]]) -> None:
    """Run every check, so that the user sees all problems at once.

    Raises:
        UserError: checks raised it. The message consists of their messages, each starting on a new line.
    """
    lines: list[str] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            lines += str(error).splitlines()
    if lines:
        raise UserError("\n".join(dict.fromkeys(lines)))


def nearest(name: object, options: Iterable[object]) -> str:
    """Return `` Did you mean 'x'?`` for the option most similar to ``name``, or an empty string.

    The result is meant to be appended to a message that lists the options.
    """
    close = difflib.get_close_matches(str(name), [str(option) for option in options], n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def choose(what: str, name: object, options: Iterable[object]) -> str:
    """Compose the message for a name that is not in ``options``, with the closest option and a list of all options."""
    names = [str(option) for option in options]
    return f"{what}={name} is not known.{nearest(name, names)} Options: {', '.join(names)}."
