"""Compare runs: group them by their settings, rank the groups, and test the differences to a reference."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, stdev
from typing import Any

import numpy as np

from moa_train.engine.predictions import Outcomes
from moa_train.runs.read import SEED, Run
from moa_train.runs.statistics import Interval, image_interval, mcnemar, paired_p, seed_interval
from moa_train.runtime.errors import UserError, choose

CONFIDENCE = 0.95
LABELED = 3
"""Most settings that a label lists."""
TESTED = 10
"""Most groups that are compared with the reference."""
CLASSES = 10
"""Classes with the largest differences that a comparison lists."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed.

    Attributes:
        settings: the settings that differ between groups, with the values of this one.
        selected: the best result on the split that chooses the checkpoint, of each run that has one.
        final: by metric, the results of the finished runs on the final split.
    """

    label: str
    runs: Sequence[Run]
    settings: Mapping[str, Any]
    selected: Sequence[float]
    final: Mapping[str, Sequence[float]]

    @property
    def independent(self) -> list[Run]:
        """Return one run per seed, a finished one if there is one. Repetitions of a seed are not independent."""
        found: dict[Any, Run] = {}
        for run in sorted(self.runs, key=lambda run: not run.result):
            found.setdefault(run.seed, run)
        return [run for run in self.runs if run is found[run.seed]]

    @property
    def states(self) -> dict[str, int]:
        """Return how many runs are in each state."""
        states = [run.status for run in self.runs]
        return {state: states.count(state) for state in dict.fromkeys(states)}


@dataclass(frozen=True)
class Pair:
    """Two runs of one seed: the images that only one of them classifies correctly, and McNemar's exact p."""

    seed: Any
    gained: int
    lost: int
    p: float


@dataclass(frozen=True)
class ClassChange:
    """The accuracies of a class, in percent."""

    name: str
    images: int
    reference: float
    group: float


@dataclass(frozen=True)
class Comparison:
    """A group against the reference. Differences are group minus reference; accuracies are in percentage points.

    Attributes:
        top1, loss: over the images, with bootstrap intervals; None without predictions.
        pairs: one per seed that both groups have.
        seeds: by metric, the difference of the means over seeds with t interval and p; empty if no group has two seeds
            with different results.
        paired: by metric, the differences of the seeds that both groups have, and the p of their t-test, for at least
            two such seeds; None if the differences are equal.
        verdict: a result, such as "better" or "within noise", a colon, and the reason.
        missing: commands that write the predictions that are missing.
    """

    label: str
    reference: str
    images: int
    top1: Interval | None
    loss: Interval | None
    pairs: Sequence[Pair]
    seeds: Mapping[str, tuple[Interval, float]]
    paired: Mapping[str, tuple[Sequence[float], float | None]]
    verdict: str
    classes: Sequence[ClassChange]
    missing: Sequence[str]


@dataclass(frozen=True)
class Report:
    """A comparison.

    Attributes:
        split: the final split; ``none`` if no run has a final result.
        selection: the split that chooses the checkpoints.
        metric: the metric that ranks the groups.
        metrics: all metrics of the final results.
        groups: the best one first.
        common: settings that are the same in all runs and that a reader wants to know.
        level: confidence of each interval; all of them hold together with `CONFIDENCE`.
        notes: what a reader must know, such as runs that were left out.
    """

    split: str
    selection: str
    metric: str
    metrics: Sequence[str]
    groups: Sequence[Group]
    comparisons: Sequence[Comparison]
    common: Mapping[str, Any]
    level: float
    notes: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON."""
        groups = [
            {
                "label": group.label,
                "settings": group.settings,
                "selected": group.selected,
                "final": group.final,
                "runs": [
                    {
                        "path": str(run.path),
                        "seed": run.seed,
                        "status": run.status,
                        "step": run.step,
                        "training_seconds": run.training_seconds,
                        "images_per_second": run.images_per_second,
                        "memory": run.memory,
                        "machine": run.machine,
                    }
                    for run in group.runs
                ],
            }
            for group in self.groups
        ]
        comparisons = [asdict(comparison) for comparison in self.comparisons]
        rest = {name: getattr(self, name) for name in ("split", "selection", "metric", "level", "notes")}
        return {**rest, "groups": groups, "comparisons": comparisons}


def lower_is_better(metric: str, runs: Sequence[Run]) -> bool:
    """Return whether a smaller value of a metric is better, as results record it; those of older versions do not."""
    for run in runs:
        higher = run.result.get("higher_is_better", {}).get(metric)
        if higher is not None:
            return not higher
    return any(word in metric.lower() for word in ("loss", "error", "nll", "perplexity"))


def compare(
    runs: Sequence[Run],
    *,
    split: str | None = None,
    metric: str | None = None,
    ranked: bool = True,
    notes: Sequence[str] = (),
) -> Report:
    """Compare runs.

    Args:
        runs: at least one.
        split: the final split; by default test if a run has a result on it, else the split that chooses checkpoints.
        metric: what to rank by; by default the one that chooses the best checkpoint.
        ranked: whether the best group is the reference and comes first. Otherwise, the first group is the reference.
        notes: of `read_runs`.

    Raises:
        UserError: the runs used different images, or there is no such split or metric.
    """
    metric = metric or runs[0].best_by
    selection = next((run.selection for run in runs if run.selection != "none"), "none")
    finished = [run for run in runs if run.result]
    splits = [name for name in ("test", "val") if any(isinstance(run.result.get(name), dict) for run in finished)]
    if split is not None and split not in splits:
        raise UserError(choose("split", split, splits or ["(no run is finished)"]))
    split = split or (splits[0] if splits else "none")
    for name in {split, selection} - {"none"}:
        _check_same_images(runs, name)
    metrics = [
        name
        for name in dict.fromkeys(key for run in finished for key in run.result.get(split, {}))
        if not name.endswith("_count") and name not in ("step", "total")
    ]
    if metrics and metric not in metrics:
        raise UserError(choose("metric", metric, metrics))
    groups, lower = _groups(runs, split, selection, metric, metrics), lower_is_better(metric, runs)
    if ranked:
        groups.sort(key=lambda group: _rank(group, metric, lower))
    tested = [group for group in groups[1:] if group.final.get(metric) and groups[0].final.get(metric)][:TESTED]
    level = 1 - (1 - CONFIDENCE) / max(len(tested), 1)
    comparisons = [_compare(group, groups[0], groups, split, metric, metrics, lower, level) for group in tested]
    notes = [*notes, *_notes(runs, selection, groups, comparisons, level)]
    return Report(split, selection, metric, metrics, groups, comparisons, _common(runs), level, notes)


def _check_same_images(runs: Sequence[Run], split: str) -> None:
    by_data: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        if data := run.data(split):
            by_data.setdefault((str(data.get("name")), str(data.get("fingerprint"))), []).append(run.name)
    if len(by_data) > 1:
        lines = [
            f"  {name}, fingerprint {fingerprint}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
            for (name, fingerprint), names in by_data.items()
        ]
        raise UserError(
            f"These runs cannot be compared, because their {split} images differ:\n" + "\n".join(lines) + "\n"
            "Compare the runs of one data set at a time."
        )


def _groups(runs: Sequence[Run], split: str, selection: str, metric: str, metrics: Sequence[str]) -> list[Group]:
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        by_settings.setdefault(repr(sorted(run.settings.items())), []).append(run)
    grouped = list(by_settings.values())
    keys = list(dict.fromkeys(key for members in grouped for key in members[0].settings))
    different = [key for key in keys if len({repr(members[0].settings.get(key)) for members in grouped}) > 1]
    leaves = [key.rpartition(".")[2] for key in different]
    short = {key: leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(different, leaves, strict=True)}
    short |= {key: ".".join(key.split(".")[-2:]) for key in different if key.endswith((".enabled", ".name", ".args"))}
    groups = []
    for members in grouped:
        settings = {key: members[0].settings.get(key) for key in different}
        label = " ".join(f"{short[key]}={shown(value)}" for key, value in settings.items())
        if not 0 < len(different) <= LABELED:
            label = members[0].name + (f" (and {len(members) - 1} more)" if len(members) > 1 else "")
        group = Group(label, members, settings, [], {})
        selected = [value for run in group.independent if (value := run.best(metric, selection)) is not None]
        final = {
            name: [value for run in group.independent if (value := run.final(split, name)) is not None]
            for name in metrics
        }
        groups.append(replace(group, selected=selected, final=final))
    return _distinct(groups)


def _distinct(groups: Sequence[Group]) -> list[Group]:
    """Return the groups with distinct labels: a number is added to those that several groups have."""
    labels = [group.label for group in groups]
    return [
        group
        if labels.count(group.label) == 1
        else replace(group, label=f"{group.label} [{labels[:place].count(group.label) + 1}]")
        for place, group in enumerate(groups)
    ]


def shown(value: Any) -> str:
    """Return a setting as it is written on a command line, shortened."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace(" ", "")


def _rank(group: Group, metric: str, lower: bool) -> tuple[bool, bool, float]:
    """Return a sort key: groups with finished runs first, then by the split that chooses checkpoints."""
    values = group.selected or group.final.get(metric, [])
    value = fmean(values) if values else 0.0
    return not group.final.get(metric), not values, value if lower else -value


def _compare(
    group: Group,
    reference: Group,
    groups: Sequence[Group],
    split: str,
    metric: str,
    metrics: Sequence[str],
    lower: bool,
    level: float,
) -> Comparison:
    ours, theirs = (
        {id(run): found for run in some.independent if run.result and (found := run.outcomes(split)) is not None}
        for some in (group, reference)
    )
    missing = [
        run.command("moa-eval", ckpt=run.path, split=split)
        for some, found in ((group, ours), (reference, theirs))
        for run in some.independent
        if run.result and id(run) not in found
    ]
    top1 = top5 = loss = None
    changes: list[ClassChange] = []
    images = 0
    if ours and theirs:
        everyone = [*ours.values(), *theirs.values()]
        _check_same_outcomes(everyone, [run for some in (group, reference) for run in some.independent], split)
        images = len(everyone[0].labels)
        hits, hits5, losses = (
            [np.mean([measure(found) for found in some.values()], axis=0) for some in (ours, theirs)]
            for measure in (_hits, _hits5, _losses)
        )
        top1 = image_interval(100 * (hits[0] - hits[1]), level)
        top5 = image_interval(100 * (hits5[0] - hits5[1]), level)
        loss = image_interval(losses[0] - losses[1], level)
        changes = _classes(everyone[0], hits[1], hits[0])
    matched = _matched(group, reference)
    pairs = []
    for first, second in matched:
        if id(first) in ours and id(second) in theirs:
            gained, lost, p = mcnemar(_hits(ours[id(first)]), _hits(theirs[id(second)]))
            pairs.append(Pair(first.seed, gained, lost, p))
    seeds: dict[str, tuple[Interval, float]] = {}
    paired: dict[str, tuple[Sequence[float], float | None]] = {}
    for name in metrics:
        everything = [some.final[name] for some in groups]
        if group.final[name] and reference.final[name]:
            interval = seed_interval(group.final[name], reference.final[name], everything, level)
            seeds |= {name: interval} if interval is not None else {}
        values = [(first.final(split, name), second.final(split, name)) for first, second in matched]
        differences = [a - b for a, b in values if a is not None and b is not None]
        if len(differences) > 1:
            paired[name] = (differences, paired_p(differences))
    over_images = {"top1": top1, "top5": top5, "loss": loss}.get(metric)
    over_seeds = seeds[metric][0] if metric in seeds else None
    verdict = _verdict(over_images, over_seeds, lower, bool(images))
    return Comparison(group.label, reference.label, images, top1, loss, pairs, seeds, paired, verdict, changes, missing)


def _matched(group: Group, reference: Group) -> list[tuple[Run, Run]]:
    """Return the finished runs of both groups by seed. If both have one run, these two are a pair in any case."""
    ours, theirs = ({run.seed: run for run in some.independent if run.result} for some in (group, reference))
    common = [(ours[seed], theirs[seed]) for seed in sorted(ours, key=str) if seed in theirs]
    if not common and len(ours) == len(theirs) == 1:
        return [(next(iter(ours.values())), next(iter(theirs.values())))]
    return common


def _verdict(images: Interval | None, seeds: Interval | None, lower: bool, predictions: bool) -> str:
    known = [found for found in (images, seeds) if found is not None]
    if not known:
        reason = "this metric cannot be tested over images" if predictions else "there are no predictions"
        return f"not tested: {reason}, and no settings have two seeds with different results"
    word = "better" if (known[0].mean < 0) == lower else "worse"
    if images is not None and not images.excludes_zero:
        return "within noise: other images might reverse the difference"
    if seeds is not None and not seeds.excludes_zero:
        return "within noise: other seeds might reverse the difference"
    if images is None:
        return f"{word}: the difference exceeds the noise between seeds; the noise of the images was not tested"
    if seeds is None:
        unknown = "the noise between seeds is unknown, because no settings have two seeds with different results"
        return f"{word} on these images: {unknown}"
    return f"{word}: the difference exceeds the noise of the images and between seeds"


def _hits(outcomes: Outcomes) -> Any:
    return outcomes.rank == 0


def _hits5(outcomes: Outcomes) -> Any:
    return outcomes.rank < 5


def _losses(outcomes: Outcomes) -> Any:
    return -outcomes.log_probability.astype(np.float64)


def _check_same_outcomes(everyone: Sequence[Outcomes], runs: Sequence[Run], split: str) -> None:
    first = everyone[0]
    for other in everyone[1:]:
        same = str(other.fingerprint) == str(first.fingerprint) and list(other.classes) == list(first.classes)
        if not same or not np.array_equal(other.labels, first.labels):
            raise UserError(
                f"The predictions of {', '.join(run.name for run in runs)} on {split} are of different images or "
                "classes. Evaluate all runs on the same data again with moa-eval."
            )


def _classes(outcomes: Outcomes, reference: Any, group: Any) -> list[ClassChange]:
    """Return the classes whose accuracy differs most."""
    count = np.bincount(outcomes.labels, minlength=len(outcomes.classes))
    old, new = (
        100 * np.bincount(outcomes.labels, weights=hits, minlength=len(count)) / np.maximum(count, 1)
        for hits in (reference, group)
    )
    order = [
        label for label in np.argsort(-np.abs(new - old), kind="stable") if count[label] and new[label] != old[label]
    ]
    return [
        ClassChange(str(outcomes.classes[label]), int(count[label]), float(old[label]), float(new[label]))
        for label in order[:CLASSES]
    ]


def _common(runs: Sequence[Run]) -> dict[str, Any]:
    keys = (
        "data.name",
        "model.name",
        "model.variant",
        "schedule.duration",
        "engine.batch_size",
        "optim.name",
        "optim.lr",
    )
    values = {key: {repr(run.config.get(key)) for run in runs} for key in keys}
    return {key: runs[0].config.get(key) for key in keys if len(values[key]) == 1}


def _notes(
    runs: Sequence[Run], selection: str, groups: Sequence[Group], comparisons: Sequence[Comparison], level: float
) -> list[str]:
    notes = []
    if others := [run.name for run in runs if run.selection not in (selection, "none")]:
        notes.append(
            f"{', '.join(others[:4])}{', ...' if len(others) > 4 else ''}: another split than {selection} chose the "
            f"checkpoint, so these runs have no best result on {selection}."
        )
    states = [run.status for run in runs]
    if rest := [f"{states.count(state)} {state}" for state in dict.fromkeys(states) if state != "finished"]:
        notes.append(
            f"{states.count('finished')} of {len(runs)} runs are finished ({', '.join(rest)}); the others count only "
            "with their evaluations so far."
        )
    if repeated := len(runs) - sum(len(group.independent) for group in groups):
        notes.append(f"{repeated} runs repeat the settings and the seed of another one, and do not count.")
    if any(len(group.independent) == 1 for group in groups) and len(groups) > 1:
        notes.append("Some settings were run with one seed only; their own noise between seeds is unknown.")
    if len({run.machine for run in runs}) > 1:
        notes.append("The runs used different machines, so their speeds and times cannot be compared.")
    if len({str(run.origin.get("code", {}).get("sha256")) for run in runs}) > 1:
        notes.append("The runs were started with different versions of the code.")
    if len(comparisons) == TESTED < len(groups) - 1:
        notes.append(f"Only the first {TESTED} settings are tested against the reference.")
    if len(comparisons) > 1:
        notes.append(
            f"Each interval has a confidence of {100 * level:.4g}%, so all {len(comparisons)} comparisons hold "
            f"together with {100 * CONFIDENCE:.0f}% (Bonferroni)."
        )
    return notes


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Format values as their mean and, for at least two, their standard deviation."""
    if not values:
        return "-"
    return f"{fmean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")


def seeds_of(group: Group) -> list[Any]:
    """Return the seeds of a group, in order."""
    return sorted({run.config.get(SEED) for run in group.runs}, key=str)


def mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Return the mean of curves (x, y) at every x that all of them have; empty curves do not count."""
    known = [dict(curve) for curve in curves if curve]
    common = set.intersection(*map(set, known)) if known else set()
    return [(x, fmean(curve[x] for curve in known)) for x in sorted(common)]
