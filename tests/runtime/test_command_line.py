"""Printed arguments: shells and Hydra read back what was meant."""

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import moa_train
from moa_train.runtime.command_line import argument, path

TEXTS = ["outputs/run", "a b", "a=b", "x[1]{2}", "it's", 'say "hi"', "$HOME/${x}", "a,b"]
TEXTS += ["~/x", "1e3", "null", "ä", "\\'"]


@pytest.mark.parametrize("text", [*TEXTS, *(f"/data/{text}" for text in TEXTS)])
def test_what_is_printed_means_what_was_meant(text):
    for value in (text, Path(text)):
        (word,) = shlex.split(argument("run_dir", value))
        override = OverridesParser.create().parse_override(word)
        config = OmegaConf.create({"run_dir": override.value()})
        assert (override.key_or_group, config.run_dir) == ("run_dir", text)


def test_home_is_expanded_in_the_paths_of_all_commands(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert [path(text) for text in ("~/x", "~nobody-here/x", "a/~")] == [
        Path(text) for text in ("/home/me/x", "~nobody-here/x", "a/~")
    ]
    sources = "".join(file.read_text() for file in Path(moa_train.__file__).parent.rglob("*.py"))
    assert sources.count("type=path") > 7
    assert "type=Path" not in sources


def test_plain_values_stay_plain():
    assert argument("resume", "outputs/digits-moa_micro-20260101-000000") == (
        "resume=outputs/digits-moa_micro-20260101-000000"
    )
    assert argument("step", 3) == "step=3"
    assert argument("code", ["my_package", "b"]) == "'code=[my_package,b]'"
