"""Optional libraries of the export formats."""

from collections.abc import Sequence
from importlib.util import find_spec

from moa_train.runtime.errors import UserError


def require(name: str, libraries: Sequence[str], extra: str = "export") -> None:
    """Raise `UserError` if one of the libraries that the format ``name`` needs is not installed."""
    missing = [library for library in libraries if find_spec(library) is None]
    if missing:
        raise UserError(
            f"format={name} requires {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            f"installed. Run: pip install 'moa-train[{extra}]'"
        )
