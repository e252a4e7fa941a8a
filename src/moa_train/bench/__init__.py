"""Measuring, with ratios that can be believed: everything that is compared runs in turn, in one process.

A part of `moa-bench` is a module here with one function:

    def prepare(job: Job) -> Callable[[], Iterator[Table]]

It checks all that can be known before anything is measured (data, peers, precision; `UserError`), and returns the
function that measures. That one times its contenders with `timing.timed` and `timing.alternate`, and yields a `Table`
of `Row` as soon as it has one. A new part is entered in `PARTS` of cli/bench.py.
"""
