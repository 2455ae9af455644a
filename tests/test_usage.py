"""`./run.sh` helps those who ask, and says what is wrong to those who call it wrongly."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from pipeline.completion import COMMANDS, NO_OPTIONS, script
from pipeline.recipe import ROOT
from tests.conftest import run_process

RUN = str(ROOT / "run.sh")


@pytest.mark.slow
def test_help() -> None:
    assert "COMMAND: all (default)" in run_process([RUN, "--help"]).stdout
    for command in [
        "all",
        "prepare",
        "train",
        "sweep",
        "evaluate",
        "translate",
        "serve",
        "score",
        "classify",
        "export",
        "analyse",
        "dashboard",
    ]:
        shown = run_process([RUN, command, "--help"])
        assert shown.returncode == 0, shown.stderr
        assert " max_steps," in shown.stdout
        assert len(shown.stdout.splitlines()) < 60
    explained = run_process([RUN, "prepare", "--help_keys"])
    assert explained.returncode == 0, explained.stderr
    assert explained.stdout.count("--training.max_steps VALUE\n") == 1
    shown = run_process([RUN, "--config", "recipes/quickstart.yaml", "translate", "--help"])
    assert shown.stdout.startswith("usage: translate [OPTION VALUE]... [--SECTION.KEY VALUE]...\n")
    assert shown.stdout.index("--input") < shown.stdout.index("--config") < 1500


@pytest.mark.parametrize(
    ("flag", "command"),
    [
        ("--alignment", "translate"), ("--fold", "export"), ("--prefix", "translate"),
        ("--scores", "translate"), ("--steps_left", "train"), ("--tokens", "score"),
    ],
)  # fmt: skip
def test_a_command_may_come_behind_an_option_without_a_value(flag: str, command: str) -> None:
    shown = run_process([RUN, flag, command, "--help"])
    assert shown.stdout.startswith(f"usage: {command} "), shown.stderr


def test_version() -> None:
    done = run_process([RUN, "--version"])
    assert done.stdout == f"ringformer-pipeline {version('ringformer-pipeline')}\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("ana", ["analyse"]),
        ("export --for", ["--format"]),
        ("export --format c", ["ctranslate2"]),
        ("train --training.warm", ["--training.warmup_steps"]),
        ("evaluate --data.stored", ["--data.stored_size"]),
        ("translate --input READ", ["README.md"]),
    ],
)
def test_completion(words: str, expected: list[str], tmp_path: Path) -> None:
    """Bash completes what has been typed, whatever the task."""
    (tmp_path / "script").write_text(script())
    typed = ["./run.sh", *words.split()]
    done = run_process(
        ["bash", "-c", f'source {tmp_path}/script; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
         '_shtab_run_sh; printf "%s\\n" "${COMPREPLY[@]}"', "bash", *typed]
    )  # fmt: skip
    assert done.stdout.splitlines() == expected, done.stderr


def test_completion_has_the_commands_that_help_names() -> None:
    shown = run_process([RUN, "help"]).stdout.partition("COMMAND: ")[2].partition("\n\n")[0]
    named = re.findall(r"^ {0,9}(\w+)(?: \(default\))?  ", shown, re.MULTILINE)
    assert sorted(named) == sorted([*COMMANDS, *NO_OPTIONS])


def test_no_door_imports_what_takes_seconds() -> None:
    """A wrong argument, and that all is up to date, are told at once."""
    doors = "train, evaluate, translate, serve, classify, export, analyse, dashboard, prepare"
    code = (
        f"import sys; from pipeline import {doors}\n"
        "print({'torch', 'fairseq2', 'deepspeed', 'mlflow', 'matplotlib'} & sys.modules.keys())"
    )
    done = run_process([sys.executable, "-c", code])
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["fly"], 2, "unknown command `fly`"),
        (["prepare", "--data.rot", "x"], 2, "did you mean `--data.root`?"),
        (["evaluate", "--run_dir", "/tmp/nothing-here"], 1, "run `./run.sh train`"),
        (["evaluate", "--model", "a", "--model", "b"], 2, "--model is given twice"),
        (["translate", "--model", "/tmp/nothing-here"], 1, "not an exported model"),
        (["train", "--run_dir", "/tmp/nothing-here"], 1, "run `./run.sh prepare` first"),
    ],
)
def test_errors(arguments: list[str], code: int, expected: str) -> None:
    done = run_process([RUN, *arguments])
    assert done.returncode == code, done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
