"""moa-compare: compare runs, or show the leaderboard of a sweep."""

import argparse
import json
import logging
from collections.abc import Sequence

from moa_train.runtime.command_line import leave_with, path
from moa_train.runtime.errors import UserError
from moa_train.runtime.libraries import require
from moa_train.runtime.output import protect_output

EXAMPLES = """moa-compare: compare runs, or show the leaderboard of a sweep.

Runs that differ only in the seed form one group. A difference is within noise if an interval contains zero: that of a
bootstrap over the images, or that of a t-test over seeds with the pooled variance of all groups. McNemar's exact test
and the paired t-test are shown in addition. The first run is the reference or, for a folder of runs, the best.

Examples:
  moa-compare outputs/RUN outputs/OTHER
  moa-compare outputs/SWEEP                              the leaderboard of a sweep, also while it runs
  moa-compare outputs/SWEEP --html compare.html          curves and tables on one page, without network access
  moa-compare outputs/SWEEP --metric loss --json compare.json"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="moa-compare", description=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "runs", nargs="+", type=path, metavar="RUN", help="run folder, or folder of runs such as a sweep"
    )
    result.add_argument("--split", help="split of the final results (default: test if there is one)")
    result.add_argument(
        "--metric", help="metric that ranks the runs (default: the one that chooses the best checkpoint)"
    )
    result.add_argument("--html", type=path, metavar="FILE", help="write a page with curves and tables")
    result.add_argument("--json", type=path, metavar="FILE", help="write all numbers")
    return result


def run(options: argparse.Namespace) -> int:
    """Compare runs, print and write the result, and return the exit code."""
    for file in (options.html, options.json):
        if file and not file.absolute().parent.is_dir():
            raise UserError(f"{file}: there is no folder {file.absolute().parent}.")
    if options.html:
        require("--html", ["matplotlib"], "plot")
    from moa_train.runs.compare import compare
    from moa_train.runs.read import read_runs
    from moa_train.runs.text import as_text
    from moa_train.runtime.files import write_whole

    runs, notes = read_runs(options.runs)
    ranked = any(not (run / "config.json").is_file() for run in options.runs)
    report = compare(runs, split=options.split, metric=options.metric, ranked=ranked, notes=notes)
    if options.html:
        from moa_train.runs.html import as_html

        write_whole(options.html, as_html(report))
    if options.json:
        write_whole(options.json, json.dumps(report.as_dict(), indent=1) + "\n")
    print(as_text(report))
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    protect_output()
    logging.basicConfig(format="%(message)s")
    options = parser().parse_args(arguments)
    leave_with(lambda: run(options))


if __name__ == "__main__":
    main()
