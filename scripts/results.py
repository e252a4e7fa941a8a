"""Write the tables, conclusions and figures of docs/RESULTS.md from the records of runs."""

import re
import statistics
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import figures
import records
from records import Row, Table
from scipy import stats

from moa_train.runs.statistics import ROUNDING
from moa_train.runtime.files import write_whole

IMAGES = {"test": "test", "val": "held-out"}
COSTS = {"parameters": "parameters", "macs": "multiply-accumulates"}
TARGET, LEVEL, POWER = 0.5, 0.05, 0.8
"""The difference for which the number of seeds is estimated, the level of the two-sided test, and its power."""


def write() -> None:
    """Replace every block between marks, <!-- NAME --> and <!-- end -->, in docs/RESULTS.md and README.md."""
    tables = records.tables()
    small = [table for name, table in tables.items() if name.startswith("small_")]
    rows = [row for table in tables.values() for row in table.rows]
    blocks: dict[str, Callable[[], str]] = {name: partial(markdown, table) for name, table in tables.items()}
    blocks |= {f"{row.recipe}.sentence": partial(sentence, row) for row in rows if row.name == "base"}
    claims = [(table, row) for table in small for row in table.rows if row.claim]
    blocks |= {f"{table.name}.{row.name}": partial(gain, table, row) for table, row in claims}
    blocks["conclusions"] = lambda: "\n".join(conclusion(table, row) for table, row in claims)
    blocks["small"] = lambda: picture("small", differences(small))
    blocks["minutes"] = lambda: picture("minutes", minutes(rows))
    for path in (records.ROOT / "docs" / "RESULTS.md", records.ROOT / "README.md"):
        write_whole(path, filled(path.read_text(), blocks))


def filled(text: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """Return a document with current blocks. A block stays within its line if the marks are on one line."""

    def current(found: re.Match[str]) -> str:
        name, edge = found[1], "\n" if "\n" in found[0] else ""
        return f"<!-- {name} -->{edge}{blocks[name]()}{edge}<!-- end -->"

    return re.sub(rf"<!-- ({'|'.join(map(re.escape, blocks))}) -->.*?<!-- end -->", current, text, flags=re.DOTALL)


def markdown(table: Table) -> str:
    """Return a table in Markdown, with its runs, the number of seeds that it needs, and its figure.

    The table shows mean and standard deviation over seeds, and paired differences from the first row.
    """
    images = IMAGES[table.rows[0].split]
    lines = [f"**{table.title}**", "", f"`scripts/reproduce.sh {table.name}`", ""]
    lines.append(f"| | parameters (k) | MACs (M) | seeds | {images} top-1 (%) | difference, paired by seed | |")
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for row in table.rows:
        found, cost = list(row.accuracies().values()), row.cost()
        cells = [row.label, f"{cost['parameters'] / 1e3:,.0f}", f"{cost['macs'] / 1e6:,.1f}", str(len(found) or "")]
        lines.append(f"| {' | '.join([*cells, mean(found), *compared(table, row)])} |")
    below = [provenance(table.rows), needed(table), reached(table)]
    drawn = {"curves": curves, "loss": losses, "differences": lambda table: differences([table])}
    if table.figure:
        below.append(picture(table.name, drawn[table.figure](table)))
    return "\n\n".join(["\n".join(lines), *filter(None, below)])


def wrapped(text: str, indent: str = "") -> str:
    """Return a paragraph in lines of at most 120 characters."""
    return textwrap.fill(text, 120, subsequent_indent=indent, break_on_hyphens=False)


def mean(values: Sequence[float]) -> str:
    """Return mean and standard deviation, as far as there are any."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def paired(row: Row, reference: Row) -> list[float]:
    """Return the difference from the reference for each common seed."""
    found, other = row.accuracies(), reference.accuracies()
    return [found[seed] - other[seed] for seed in sorted(found.keys() & other.keys())]


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95% confidence interval of the mean, by Student's t distribution.

    There is none for a single seed, and for seeds with equal differences, which say nothing about the noise.
    """
    if max(differences) - min(differences) < ROUNDING:
        return None
    center, error = statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    half = float(stats.t.ppf(1 - LEVEL / 2, len(differences) - 1)) * error
    return center - half, center + half


def verdict(differences: Sequence[float]) -> str:
    """Return whether the mean difference is within noise; nothing if there is no interval."""
    if not differences or (found := interval(differences)) is None:
        return ""
    low, high = found
    return "within noise" if low <= 0 <= high else "worse" if high < 0 else "better"


def described(differences: Sequence[float]) -> str:
    """Return the mean difference with its interval and the number of seeds."""
    if not differences:
        return ""
    count = f"n = {len(differences)}"
    if found := interval(differences):
        count = f"{found[0]:+.2f} to {found[1]:+.2f}, {count}"
    return f"{statistics.fmean(differences):+.2f} ({count})"


def compared(table: Table, row: Row) -> tuple[str, str]:
    """Return the last two cells of a row: its difference from the first row, and what it means."""
    if row is table.rows[0]:
        return "reference", row.decision
    found = paired(row, table.rows[0])
    return described(found), ", ".join(filter(None, (verdict(found), row.decision)))


def gain(table: Table, row: Row) -> str:
    """Return the difference of the first row from this one in words."""
    found = paired(table.rows[0], row)
    return f"{described(found)}, {result}" if (result := verdict(found)) else "not measured yet"


def conclusion(table: Table, row: Row) -> str:
    """Return one line: the difference of the first row from this one, and whether it agrees with the paper."""
    first = table.rows[0]
    found = paired(first, row)
    if not (result := verdict(found)):
        return f"- {row.claim}: not measured yet."
    ratios = [f"{first.cost()[key] / row.cost()[key]:.2f} times the {name}" for key, name in COSTS.items()]
    paper = {"better": "This confirms the paper.", "worse": "This contradicts the paper."}
    says = paper.get(result, "This does not confirm the paper, which reports a gain.") if row.paper else ""
    text = f"- {row.claim}: **{described(found)}**, {result}, with {' and '.join(ratios)}. {says}"
    return wrapped(text, indent="  ")


def sentence(row: Row) -> str:
    """Return the accuracy of a row in words, with the minutes of runs that had their machine for themselves."""
    if not (runs := row.records()):
        return f"`{row.recipe}` has not been run"
    text = f"{mean(list(row.accuracies().values()))}% {IMAGES[row.split]} accuracy (n = {len(runs)})"
    times: dict[str, list[float]] = defaultdict(list)
    for record in runs.values():
        if record["minutes"] is not None:
            times[machine(record["starts"][-1])].append(record["minutes"])
    return " in ".join(filter(None, [text, timed(times)]))


def timed(minutes: Mapping[str, Sequence[float]]) -> str:
    """Return the mean minutes on each machine in words."""
    return " or ".join(
        f"{statistics.fmean(found):.0f} minutes on {place} ({len(found)} timed run{'s' * (len(found) > 1)})"
        for place, found in minutes.items()
    )


def machine(start: Mapping[str, Any]) -> str:
    """Return the hardware on which a start of a run trained."""
    hardware = start["hardware"]
    if start["device"] != "cpu":
        return str(hardware["gpus"][0].split(",")[0])
    return f"{hardware['cores']} cores of {hardware['cpu']}"


def provenance(rows: Iterable[Row]) -> str:
    """Return one line about the hardware, versions, dates and code of all runs of a table."""
    runs: Counter[str] = Counter()
    facts: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for record in [record for row in rows for record in row.records().values()]:
        place = " and ".join(sorted({machine(start) for start in record["starts"]}))
        runs[place] += 1
        for start in record["starts"]:
            facts[place]["torch"].add(start["versions"]["torch"])
            facts[place][""].add(start["precision"])
            facts[place]["commit"].add((start["code"]["commit"] or "unknown")[:7])
            facts[place]["source"].add(start["code"]["sha256"][:8])
            facts[place]["started"].add(start["started"][:10])
    texts = [
        f"{runs[place]} on {place} ("
        + ", ".join(f"{name} {' and '.join(sorted(values))}".strip() for name, values in facts[place].items())
        + ")"
        for place in sorted(runs)
    ]
    return wrapped(f"Runs: {'; '.join(texts)}.") if runs else ""


def seeds_needed(deviation: float, difference: float = TARGET) -> int:
    """Return the number of pairs with which a two-sided paired t test finds a difference with the stated power.

    Args:
        deviation: standard deviation of the paired differences.
        difference: the true mean difference.
    """
    count, power = 1, 0.0
    while power < POWER:
        count += 1
        bound, center = stats.t.ppf(1 - LEVEL / 2, count - 1), difference / max(deviation, 1e-9) * count**0.5
        power = stats.nct.sf(bound, count - 1, center) if center < 30 else 1.0  # nct fails far from zero
    return count


def needed(table: Table) -> str:
    """Return one line: how many seeds a difference of 0.5 points needs, estimated from the first three seeds."""
    first = [paired(row, table.rows[0])[:3] for row in table.rows[1:]]
    deviations = [statistics.stdev(differences) for differences in first if len(differences) == 3]
    if not deviations:
        return ""
    pooled = (sum(deviation**2 for deviation in deviations) / len(deviations)) ** 0.5
    counts = sorted(map(seeds_needed, deviations))
    each = f", {counts[0]} to {counts[-1]} for single rows" if len(counts) > 1 else ""
    return wrapped(
        f"A difference of {TARGET} points needs about {seeds_needed(pooled)} seeds{each} (two-sided 5%, power 80%, "
        f"paired t test; estimated from the first three seeds, whose differences have a standard deviation of "
        f"{pooled:.2f})."
    )


def reached(table: Table) -> str:
    """Return a sentence for each row: the epochs after which its runs first reach the table's target.

    The minutes are those that the timed runs take for the mean of these epochs, whether they reach the target or not.
    """
    lines = []
    for row in table.rows if table.target is not None else ():
        runs, epochs = row.records().values(), []
        per_epoch: dict[str, list[float]] = defaultdict(list)
        for record in runs:
            curve = [(found["epoch"], found["top1"]) for found in record["evaluations"] if found["split"] == "val"]
            epochs += [epoch for epoch, top1 in curve if top1 >= table.target][:1]
            if record["minutes"] is not None:
                per_epoch[machine(record["starts"][-1])].append(record["minutes"] / curve[-1][0])
        after = ""
        if epochs:
            average = statistics.fmean(epochs)
            time = timed({place: [minutes * average for minutes in found] for place, found in per_epoch.items()})
            after = f" after {mean(epochs)} epochs{f', {time}' if time else ''}"
        if runs:
            reach = f"{len(epochs)} of {len(runs)} runs reach {table.target:g}% of the held-out images"
            lines.append(f"{row.label}: {reach}{after}.")
    return "\n".join(map(wrapped, lines))


def picture(name: str, figure: dict[str, Any] | None) -> str:
    """Draw a figure if its data have changed, and return it in Markdown. Without data, there is no figure."""
    path = records.ROOT / "docs" / "images" / f"{name}.svg"
    if figure is None:
        path.unlink(missing_ok=True)
        return ""
    figures.draw(figure, path)
    return f"![{figure['alt']}](images/{path.name})"


def band(curves: Sequence[Mapping[float, float]]) -> dict[str, list[float]]:
    """Return mean and standard deviation of several curves at their common places."""
    places = sorted(set.intersection(*(set(curve) for curve in curves)))
    columns = [[curve[place] for curve in curves] for place in places]
    deviations = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in columns]
    return {"x": places, "mean": [statistics.fmean(values) for values in columns], "deviation": deviations}


def thinned(points: Sequence[Sequence[float]], most: int = 60) -> dict[float, float]:
    """Return a training curve, epoch to loss, with consecutive points averaged if there are many."""
    size = -(-len(points) // most)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return {group[-1][1]: statistics.fmean(point[2] for point in group) for group in groups}


def curves(table: Table) -> dict[str, Any] | None:
    """Return the figure of training loss and held-out accuracy against epochs."""
    found = {row.label: list(row.records().values()) for row in table.rows}
    found = {f"{label} (n = {len(runs)})": runs for label, runs in found.items() if runs}
    if not found:
        return None
    loss = {label: band([thinned(run["train"]) for run in runs]) for label, runs in found.items()}
    panels = [{"title": "training loss (nats, augmented images)", "lines": loss}]
    evaluated = {
        label: [
            {row["epoch"]: row["top1"] for row in run["evaluations"] if row["split"] == "val" and "epoch" in row}
            for run in runs
        ]
        for label, runs in found.items()
    }
    if all(curve for runs in evaluated.values() for curve in runs):
        lines = {label: band(runs) for label, runs in evaluated.items()}
        panels.append({"title": "top-1 on held-out images (%)", "lines": lines})
    last = "; ".join(f"{label}: {line['mean'][-1]:.2f}" for label, line in panels[-1]["lines"].items())
    alt = f"{' and '.join(panel['title'] for panel in panels)} against epochs, at the end {last}"
    return {"kind": "lines", "alt": alt, "panels": panels}


def losses(table: Table) -> dict[str, Any] | None:
    """Return the figure of training losses, and of their differences from the first row, paired by seed."""
    found = {row.label: {seed: thinned(run["train"]) for seed, run in row.records().items()} for row in table.rows}
    found = {label: runs for label, runs in found.items() if runs}
    reference = found.get(table.rows[0].label, {})
    pairs: dict[str, list[dict[float, float]]] = {}
    for label, runs in found.items():
        common = sorted(runs.keys() & reference.keys())
        pairs[label] = [
            {place: loss - reference[seed][place] for place, loss in runs[seed].items() if place in reference[seed]}
            for seed in common
        ]
    if not found or not all(pairs.values()):
        return None
    panels = [
        {
            "title": "training loss (nats, augmented images)",
            "lines": {label: band(list(runs.values())) for label, runs in found.items()},
        },
        {
            "title": f"difference from {table.rows[0].label}, paired by seed",
            "lines": {k: band(v) for k, v in pairs.items()},
        },
    ]
    last = "; ".join(f"{label}: {line['mean'][-1]:.3f}" for label, line in panels[0]["lines"].items())
    return {"kind": "lines", "alt": f"Training loss against epochs, at the end {last}", "panels": panels}


def differences(tables: Sequence[Table]) -> dict[str, Any] | None:
    """Return the figure of the paired differences of all rows. A pair that tables share is in the last of them only."""
    owner = {(table.rows[0].name, row.name): table.name for table in tables for row in table.rows}
    groups = {}
    for table in tables:
        own = [row for row in table.rows[1:] if owner[table.rows[0].name, row.name] == table.name]
        found = {row.label: paired(row, table.rows[0]) for row in own}
        points = {
            label: {"mean": statistics.fmean(values), "interval": interval(values)}
            for label, values in found.items()
            if values
        }
        if points:
            reference = f"reference: {table.rows[0].label}"
            groups[f"{table.title} ({reference})" if len(tables) > 1 else reference] = points
    if not groups:
        return None
    count = sum(map(len, groups.values()))
    split = IMAGES[tables[0].rows[0].split]
    alt = f"Differences of {count} variants from their reference with 95% intervals; the tables have the same figures"
    unit = f"difference from the reference in {split} top-1 (points), 95% interval, paired by seed"
    return {"kind": "differences", "alt": alt, "unit": unit, "groups": groups}


def minutes(rows: Iterable[Row]) -> dict[str, Any] | None:
    """Return the figure of accuracy against minutes of training, for runs that had their machine for themselves."""
    panels: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in {(row.recipe, row.name): row for row in rows}.values():
        places: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for record in row.records().values():
            if record["minutes"] is not None:
                places[machine(record["starts"][-1])].append(record)
        for place, found in places.items():
            x, y = (
                {"mean": statistics.fmean(values), "deviation": statistics.stdev(values) if len(values) > 1 else 0.0}
                for values in (
                    [record["minutes"] for record in found],
                    [record["result"][row.split]["top1"] for record in found],
                )
            )
            label = row.recipe if row.name == "base" else f"{row.recipe}: {row.label}"
            point = {"label": f"{label} (n = {len(found)})", "machine": place, "x": x, "y": y}
            panels[f"{row.recipe.split('_')[0]}, {IMAGES[row.split]} images"].append(point)
    if not panels:
        return None
    alt = "Top-1 against minutes of training; the tables have the same figures"
    return {"kind": "minutes", "alt": alt, "panels": panels}
