"""Commands that are printed for a run, to be pasted into a shell."""

from moa_train.runtime.command_line import argument
from moa_train.schema import RunConfig, own_code


def command(program: str, config: RunConfig, **settings: object) -> str:
    """Return a command with these settings; it allows the user's own code that the run needs."""
    packages = sorted({*config.code, *(name.split(":")[0].split(".")[0] for name in own_code(config))})
    given = {**settings, **({"code": packages} if packages else {})}
    return " ".join([program, *(argument(key, value) for key, value in given.items())])
