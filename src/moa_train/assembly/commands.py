"""Shell commands that are printed for a run, ready to copy and paste."""

from moa_train.runtime.command_line import argument
from moa_train.schema import RunConfig, own_code


def command(program: str, config: RunConfig, **settings: object) -> str:
    """Return a shell command with these settings and, as ``code=``, the user's own packages that the run imports."""
    packages = own_packages(config)
    given = {**settings, **({"code": packages} if packages else {})}
    return " ".join([program, *(argument(key, value) for key, value in given.items())])


def own_packages(config: RunConfig) -> list[str]:
    """Return the user's own packages that a run imports or may import."""
    return sorted({*config.code, *(name.split(":")[0].split(".")[0] for name in own_code(config))})
