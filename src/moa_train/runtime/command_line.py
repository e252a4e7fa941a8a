"""Read paths from the command line, and format arguments so that they can be pasted into a shell."""

import os
import re
import shlex
from pathlib import Path

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
