"""Measure performance. Candidates run interleaved in one process, so that their ratios are reliable.

Every part of ``moa-bench`` is a module with one function:

    def prepare(job: Job) -> Callable[[], Iterator[Table]]

``prepare`` checks everything that can be checked before the measurement (data, peers, precision), raises `UserError` if
necessary, and returns the function that measures. This function times its candidates with `timing.timed` and
`timing.alternate`, and yields each `Table` of `Row` objects as soon as it is complete. To add a part, add it to
``PARTS`` in cli/bench.py.
"""
