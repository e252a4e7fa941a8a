"""Comparisons of real tiny runs, against numbers computed here from their files."""

import json
import math
import re
import resource
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from moa_train.cli import compare as command
from moa_train.engine.predictions import Outcomes
from moa_train.knobs import knobs
from moa_train.report.plots import COLORS
from moa_train.runs.compare import compare
from moa_train.runs.folder import SweepFolder, mark, named
from moa_train.runs.html import as_html
from moa_train.runs.read import NOT_COMPARED, read_run, read_runs
from moa_train.runs.text import CURVES, as_text
from moa_train.runtime.errors import UserError
from moa_train.runtime.text import printable
from moa_train.schema import RunConfig

LR = {"slow": "1e-5", "fast": "1e-2"}
LEARNING = {
    "data__limit": "1000",
    "augment__mixup": "0",
    "optim__name": "adamw",
    "optim__lr_scaling": "none",
    "schedule__duration": "40 steps",
    "engine__eval_every": "20 steps",
}


@pytest.fixture(scope="module")
def sweep(train, tmp_path_factory) -> Path:
    """A folder of four runs: two learning rates, two seeds."""
    folder = tmp_path_factory.mktemp("sweep")
    for name, lr in LR.items():
        for seed in (0, 1):
            assert train(folder / f"{name}{seed}", **LEARNING, optim__lr=lr, runtime__seed=seed) == 0
    return folder


@pytest.fixture
def copied(sweep, tmp_path) -> Path:
    return Path(shutil.copytree(sweep, tmp_path / "runs"))


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())["test"]


def test_runs_are_grouped_by_seed_and_ranked(sweep):
    report = compare(read_runs([sweep])[0])
    assert [group.label for group in report.groups] == ["lr=0.01", "lr=1e-05"]
    assert [[run.name for run in group.runs] for group in report.groups] == [["fast0", "fast1"], ["slow0", "slow1"]]
    assert report.groups[0].settings == {"optim.lr": 1e-2}
    assert report.groups[0].final["top1"] == [result(sweep / name)["top1"] for name in ("fast0", "fast1")]
    assert (report.split, report.selection, report.metric) == ("test", "val", "top1")
    assert [group.label for group in compare(read_runs([sweep])[0], metric="loss").groups] == ["lr=0.01", "lr=1e-05"]


def test_differences_equal_those_of_the_files(sweep):
    (found,) = compare(read_runs([sweep])[0]).comparisons
    outcomes = {
        name: Outcomes.read(sweep / name / "predictions-test.npz") for name in ("fast0", "fast1", "slow0", "slow1")
    }
    hits = {name: some.rank == 0 for name, some in outcomes.items()}
    losses = {name: -some.log_probability.astype(float) for name, some in outcomes.items()}
    assert (found.label, found.reference, found.images) == ("lr=1e-05", "lr=0.01", 359)
    assert found.top1.mean == pytest.approx(
        np.mean([result(sweep / f"slow{seed}")["top1"] - result(sweep / f"fast{seed}")["top1"] for seed in (0, 1)])
    )
    difference = (losses["slow0"] + losses["slow1"] - losses["fast0"] - losses["fast1"]) / 2
    assert found.loss.mean == pytest.approx(difference.mean())
    half = 1.96 * difference.std() / math.sqrt(len(difference))
    assert found.loss.high - found.loss.low == pytest.approx(2 * half, rel=0.1)
    for pair, seed in zip(found.pairs, (0, 1), strict=True):
        assert pair.gained == int((hits[f"slow{seed}"] & ~hits[f"fast{seed}"]).sum())
        assert pair.lost == int((hits[f"fast{seed}"] & ~hits[f"slow{seed}"]).sum())
    seeds = [result(sweep / f"slow{seed}")["loss"] - result(sweep / f"fast{seed}")["loss"] for seed in (0, 1)]
    assert found.seeds["loss"][0].mean == pytest.approx(np.mean(seeds))
    assert found.paired["loss"][0] == seeds
    assert found.missing == []
    worst = found.classes[0]
    members = outcomes["fast0"].labels == list(outcomes["fast0"].classes).index(worst.name)
    assert worst.images == members.sum()
    assert worst.reference == pytest.approx(50 * (hits["fast0"][members].mean() + hits["fast1"][members].mean()))


def test_a_run_against_itself_is_within_noise(sweep, copied):
    config = json.loads((copied / "fast0" / "config.json").read_text())
    config["optim"]["weight_decay"] = 0.123  # pretends to be another run
    (copied / "fast0" / "config.json").write_text(json.dumps(config))
    (found,) = compare([read_run(sweep / "fast0"), read_run(copied / "fast0")], ranked=False).comparisons
    assert found.verdict.startswith("within noise")
    assert (found.top1.low, found.top1.high, found.loss.high) == (0, 0, 0)
    assert [(pair.gained, pair.lost, pair.p) for pair in found.pairs] == [(0, 0, 1)]


def test_one_seed_says_nothing_about_the_noise_between_seeds(sweep):
    report = compare([read_run(sweep / "slow0"), read_run(sweep / "fast0")], metric="loss", ranked=False)
    assert report.groups[0].label == "lr=1e-05"
    (found,) = report.comparisons
    assert found.verdict == (
        "better on these images: the noise between seeds is unknown, because no settings have two seeds with "
        "different results"
    )
    assert any("one seed only" in note for note in report.notes)


def test_equal_results_of_the_seeds_have_no_p(copied):
    for path in copied.glob("*/result.json"):
        found = json.loads(path.read_text())
        found["test"]["top1"] = 62.5 if path.parent.name.startswith("fast") else 50.3
        path.write_text(json.dumps(found))
    report = compare(read_runs([copied])[0])
    (found,) = report.comparisons
    assert "top1" not in found.seeds
    assert found.paired["top1"] == (pytest.approx([-12.2, -12.2]), None)
    assert found.verdict.startswith("worse on these images: the noise between seeds is unknown")
    assert any(line.split() == ["top1", "-12.20", "-12.20", "-"] for line in as_text(report).splitlines())


def test_missing_predictions_name_the_command(copied):
    (copied / "fast1" / "predictions-test.npz").unlink()
    (found,) = compare(read_runs([copied])[0]).comparisons
    assert found.missing == [f"moa-eval ckpt={copied}/fast1 split=test"]
    assert found.top1 is not None  # from the other seed
    for run in copied.iterdir():
        (run / "predictions-test.npz").unlink(missing_ok=True)
    config = json.loads((copied / "slow0" / "config.json").read_text())
    config["engine"]["of_a_newer_version"] = 1
    (copied / "slow0" / "config.json").write_text(json.dumps(config))
    report = compare(read_runs([copied])[0])
    assert report.comparisons[0].top1 is None
    assert set(report.comparisons[0].seeds) == {"top1", "top5", "loss"}
    assert f"  moa-eval ckpt={copied}/slow0 split=test" in as_text(report)


def test_a_command_for_a_run_of_own_code_allows_this_code(copied):
    path = copied / "fast1"
    config = json.loads((path / "config.json").read_text())
    config["engine"] |= {"metrics": ["top1", "my_package.metrics:Group.Balanced"]}
    config["engine"] |= {"best_by": "my_package.metrics:Group.Balanced"}
    (path / "config.json").write_text(json.dumps(config))
    (path / "predictions-test.npz").unlink()
    run = read_run(path)
    (found,) = compare([run, read_run(copied / "slow1")], metric="top1").comparisons
    assert found.missing == [f"moa-eval ckpt={path} split=test 'code=[my_package]'"]
    assert run.best_by == "Balanced"


def test_unfinished_runs_count_with_their_evaluations(copied):
    (copied / "fast0" / "result.json").unlink()
    (copied / "fast1" / "result.json").unlink()
    report = compare(read_runs([copied])[0])
    assert [group.label for group in report.groups] == ["lr=1e-05", "lr=0.01"]
    assert report.groups[1].states == {"stopped": 2}
    assert len(report.groups[1].selected) == 2
    assert report.comparisons == []
    assert "2 of 4 runs are finished (2 stopped)" in report.notes[0]
    for run in copied.iterdir():
        (run / "result.json").unlink(missing_ok=True)
    assert compare(read_runs([copied])[0]).split == "none"
    assert "top1 on val" in as_html(compare(read_runs([copied])[0]))


def test_runs_that_have_not_started_are_counted(copied):
    SweepFolder(copied).record([], named([["optim.lr=1"], ["optim.lr=2"]], ["optim.lr"]))
    (copied / "lr-1").mkdir()
    mark(copied / "lr-1", "failed")
    notes = read_runs([copied])[1]
    assert notes == [f"2 more runs of {copied} have not started to train (1 failed, 1 waiting)."]


def test_runs_of_different_data_are_refused(train, sweep, tmp_path):
    assert train(tmp_path / "other", data__val_fraction=0.2, schedule__duration="2 steps", schedule__warmup="0") == 0
    with pytest.raises(UserError, match="their val images differ:\n  digits/val, fingerprint"):
        compare(read_runs([sweep, tmp_path / "other"])[0])


def test_predictions_of_other_images_are_refused(copied):
    path = copied / "fast0" / "predictions-test.npz"
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, "labels": arrays["labels"][::-1]})
    with pytest.raises(UserError, match="are of different images or classes"):
        compare(read_runs([copied])[0])


def test_damaged_files(copied, tmp_path):
    (copied / "fast0" / "config.json").write_text("{")
    runs, warnings = read_runs([copied])
    assert len(runs) == 3
    assert "fast0/config.json is damaged" in warnings[0]
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        read_runs([copied / "fast0"])
    (copied / "fast1" / "result.json").write_text("[]")
    with pytest.raises(UserError, match="it holds no dict"):
        read_run(copied / "fast1")
    (copied / "slow0" / "predictions-test.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"predictions-test\.npz cannot be read"):
        read_run(copied / "slow0").outcomes("test")
    (copied / "slow1" / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": "x", "lr": null}\nnonsense\n')
    assert read_run(copied / "slow1").curve("train", "loss") == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no run"):
        read_runs([tmp_path / "empty"])
    with pytest.raises(UserError, match="there is no such folder"):
        read_runs([tmp_path / "nowhere"])


class Page(HTMLParser):
    """Collects the text, the tags and the attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_no_network_and_escapes_names(copied):
    evil = "a<script>alert('1')</script>&\"b\"\u202e"
    names = ["first & <b>", "second"]
    for name, run in zip(names, ("fast0", "slow0"), strict=True):
        path = copied / run / "predictions-test.npz"
        arrays = dict(np.load(path))
        classes = arrays["classes"].astype(object)
        classes[:] = [f"{evil}{number}" for number in range(len(classes))]
        np.savez(path, **{**arrays, "classes": classes.astype(str)})
        for number in range(5):  # so many settings differ that the folders' names are the labels
            config = json.loads((copied / run / "config.json").read_text())
            config["model"][f"own{number}"] = evil if name == "second" else number
            (copied / run / "config.json").write_text(json.dumps(config))
        (copied / run).rename(copied / name)
    report = compare([read_run(copied / name) for name in names], ranked=False)
    assert report.groups[0].label == names[0]
    settings = as_text(report).partition("\nsetting ")[2].splitlines()
    assert [text.strip() for text in settings[0].split("  ") if text.strip()] == names
    assert any(line.split()[:2] == ["model.own3", "3"] for line in settings)
    page = Page(as_html(report))
    assert printable(evil) in page.text
    assert "\u202e" not in page.text
    assert names[0] in page.text
    assert not {"b", "link", "img", "iframe"} & set(page.tags)
    assert page.tags.count("script") == 2  # of every page: its data, and what sorts tables
    addresses = [value for name, value in page.attributes if "//" in (value or "") and not name.startswith("xmlns")]
    assert addresses == []
    assert page.tags.count("svg") == 3


def test_columns_are_sorted_by_what_they_show(sweep):
    page = as_html(compare(read_runs([sweep])[0]))
    numeric = re.findall(r'<th scope="col" class="number"><button type="button">([^<]*)<', page)
    texts = re.findall(r'<th scope="col"><button type="button">([^<]*)<', page)
    assert {"training time", "images/s", "top1 on test", "p"} <= set(numeric)
    assert {"settings", "difference", "interval", "test"} <= set(texts)
    seconds = re.search(r'<td class="number"><!--([\d.]+)-->0:0\d', page)
    assert float(seconds[1]) > 0


def test_every_group_that_is_drawn_has_a_color_of_its_own():
    assert len(set(COLORS)) >= CURVES


def test_the_same_runs_give_the_same_page(sweep):
    assert as_html(compare(read_runs([sweep])[0])) == as_html(compare(read_runs([sweep])[0]))


def test_the_command(sweep, tmp_path, capsys):
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    with pytest.raises(SystemExit) as left:
        command.main([str(sweep), "--html", str(page), "--json", str(numbers)])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "lr=1e-05, compared with lr=0.01: " in shown
    assert "McNemar's test" in shown
    assert page.read_text().startswith("<!DOCTYPE html>")
    found = json.loads(numbers.read_text())
    assert found["groups"][0]["runs"][1]["seed"] == 1
    assert found["comparisons"][0]["images"] == 359
    for arguments, message in (
        ([str(sweep), "--metric", "top3"], "metric=top3 is not known."),
        ([str(sweep), "--split", "train"], "split=train is not known."),
        ([str(sweep), "--html", str(tmp_path / "no" / "page.html")], "there is no folder"),
    ):
        with pytest.raises(SystemExit) as left:
            command.main(arguments)
        assert left.value.code == 2
        assert message in capsys.readouterr().err


def test_a_page_without_matplotlib_is_an_error_before_anything_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        command.main(["nowhere", "--html", str(tmp_path / "page.html")])
    assert "--html requires matplotlib, which is not installed. Run: pip install" in capsys.readouterr().err


def test_a_full_disk_is_an_error(sweep, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(SystemExit) as left:
            command.main([str(sweep), "--html", str(tmp_path / "page.html")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left.value.code == 2
    assert "page.html cannot be written: File too large. Free some space" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_repetition_of_a_seed_does_not_count(sweep, copied):
    """It would add a degree of freedom, and no variance."""
    shutil.copytree(copied / "fast0", copied / "again")
    report, expected = compare(read_runs([copied])[0]), compare(read_runs([sweep])[0])
    assert report.groups[0].final == expected.groups[0].final
    assert len(report.groups[0].runs) == 3
    assert report.comparisons[0].seeds == expected.comparisons[0].seeds
    assert any("1 runs repeat the settings and the seed" in note for note in report.notes)


def test_a_session_that_was_ended_early_is_another_setting(copied):
    """A debug run, which ends after a step, must not stand in for the run with the same seed."""
    config = json.loads((copied / "fast0" / "config.json").read_text())
    config["engine"]["stop_after"] = "1 step"
    shutil.copytree(copied / "fast0", copied / "a_debug_run")
    (copied / "a_debug_run" / "config.json").write_text(json.dumps(config))
    report = compare(read_runs([copied])[0])
    assert sorted(len(group.runs) for group in report.groups) == [1, 2, 2]
    assert not any("repeat the settings" in note for note in report.notes)


def test_results_on_the_split_of_another_run_do_not_rank_it(copied):
    """Slow runs whose checkpoint was chosen on the test images have no best result on the validation images."""
    for name in ("slow0", "slow1"):
        log = copied / name / "metrics.jsonl"
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        rows = [{**row, "split": "test", "top1": 100.0} if "best" in row else row for row in rows]
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = compare(read_runs([copied / "fast0", copied / "fast1", copied / "slow0", copied / "slow1"])[0])
    assert [len(group.selected) for group in report.groups] == [2, 0]
    assert any("slow0, slow1: another split than val chose the checkpoint" in note for note in report.notes)


def test_predictions_of_an_unfinished_run_do_not_count(copied):
    expected = compare(read_runs([copied])[0]).comparisons[0]
    (copied / "fast1" / "result.json").unlink()  # as when the run is resumed with a longer schedule
    found = compare(read_runs([copied])[0]).comparisons[0]
    assert found.top1 != expected.top1
    shutil.rmtree(copied / "fast1")
    assert compare(read_runs([copied])[0]).comparisons[0].top1 == found.top1


def test_groups_have_distinct_labels(copied, tmp_path):
    runs = [copied / "fast0", copied / "slow0"]
    for number, run in enumerate(runs):
        config = json.loads((run / "config.json").read_text())
        config["augment"] |= {"flip": number / 2, "erasing": number / 2, "cutmix": number / 2}
        (run / "config.json").write_text(json.dumps(config))
        shutil.copytree(run, tmp_path / str(number) / "seed-0")
    report = compare(read_runs([tmp_path / "0", tmp_path / "1"])[0])
    assert [group.label for group in report.groups] == ["seed-0 [1]", "seed-0 [2]"]
    assert "seed-0 [2], compared with seed-0 [1]:" in as_text(report)


def test_results_say_whether_higher_is_better(copied):
    assert json.loads((copied / "fast0" / "result.json").read_text())["higher_is_better"] == {
        "top1": True, "top5": True, "loss": False
    }  # fmt: skip
    for path in copied.glob("*/result.json"):
        path.write_text(path.read_text().replace('"top1": true', '"top1": false'))
    assert [group.label for group in compare(read_runs([copied])[0]).groups] == ["lr=1e-05", "lr=0.01"]


def test_top5_is_tested_over_the_images(sweep):
    (comparison,) = compare(read_runs([sweep / "fast0", sweep / "slow0"])[0], metric="top5").comparisons
    assert comparison.verdict.startswith(("worse on these images", "within noise: other images"))


def test_settings_that_do_not_distinguish_runs_exist():
    keys = [key for key, _, _ in knobs(RunConfig())]
    assert all(any(key.startswith(prefix) for key in keys) for prefix in NOT_COMPARED)
