"""Arguments of commands, quoted so that they can be pasted into a shell."""

import re
import shlex

_PLAIN = re.compile(r"[A-Za-z_/.][A-Za-z0-9_/.+@%-]*", re.ASCII)
_WORDS = {"null", "true", "false", "nan", "inf"}


def argument(key: str, value: object) -> str:
    """Return ``key=value`` as it is typed: a text is quoted for Hydra and the whole for the shell, where needed."""
    text = f"[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)
    plain = not isinstance(value, str) and not hasattr(value, "__fspath__")
    if not plain and (not _PLAIN.fullmatch(text) or text.lower() in _WORDS):
        text = hydra_quoted(text)
    return shlex.quote(f"{key}={text}")


def hydra_quoted(text: str) -> str:
    """Return a text in single quotes, as Hydra's grammar reads it."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return "'" + escaped.replace("${", "\\${") + "'"
