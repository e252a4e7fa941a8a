"""Optional libraries."""

from collections.abc import Sequence
from importlib.util import find_spec

from moa_train.runtime.errors import UserError


def require(what: str, libraries: Sequence[str], extra: str) -> None:
    """Raise `UserError` if one of the libraries that ``what`` needs, and ``extra`` installs, is missing."""
    missing = [library for library in libraries if find_spec(library) is None]
    if missing:
        raise UserError(
            f"{what} requires {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            f"installed. Run: pip install 'moa-train[{extra}]'"
        )
