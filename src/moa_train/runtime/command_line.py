"""Read paths from the command line, format arguments for a shell, and leave with the exit code of a small command."""

import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from moa_train.runtime.errors import UserError
from moa_train.runtime.signals import Exit

_PLAIN = re.compile(r"[A-Za-z_/.][A-Za-z0-9_/.+@%-]*", re.ASCII)
_WORDS = {"null", "true", "false", "nan", "inf"}


def path(text: str) -> Path:
    """Return a path given as a command-line argument. Shells do not expand ~ after an equals sign or in quotes."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 Path.expanduser raises for unknown users


def argument(key: str, value: object) -> str:
    """Return ``key=value`` as a user would type it, quoted for Hydra and for the shell where necessary."""
    text = f"[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)
    plain = not isinstance(value, str) and not hasattr(value, "__fspath__")
    if not plain and (not _PLAIN.fullmatch(text) or text.lower() in _WORDS):
        text = hydra_quoted(text)
    return shlex.quote(f"{key}={text}")


def hydra_quoted(text: str) -> str:
    """Return the text in single quotes, escaped for Hydra's grammar."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return "'" + escaped.replace("${", "\\${") + "'"


def leave_with(action: Callable[[], int | None]) -> NoReturn:
    """Run a command without Hydra, and exit with its code. Errors that users can fix have no traceback."""
    try:
        sys.exit(action() or Exit.FINISHED)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename or 'the output'}: {error.strerror or error}.", file=sys.stderr)
    except KeyboardInterrupt:
        sys.exit(Exit.INTERRUPTED)
    sys.exit(Exit.USER_ERROR)
