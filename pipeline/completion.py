"""`./run.sh completion`: print a script that completes commands, options and files in bash."""

from __future__ import annotations

import argparse

import shtab

from pipeline import (
    analyse,
    classify,
    dashboard,
    evaluate,
    export,
    score,
    serve,
    sweep,
    train,
    translate,
)
from pipeline.command_line import DEFAULT_RECIPE, AddArguments, create_parser, path_argument
from pipeline.recipe_file import TASKS, recipe_keys

COMMANDS: dict[str, AddArguments] = {
    "all": lambda parser: None,
    "prepare": lambda parser: None,
    "train": train.add_arguments,
    "sweep": sweep.add_arguments,
    "evaluate": evaluate.add_arguments,
    "translate": translate.add_arguments,
    "serve": serve.add_arguments,
    "score": score.add_arguments,
    "classify": classify.add_arguments,
    "export": export.add_arguments,
    "analyse": analyse.add_arguments,
    "dashboard": dashboard.add_arguments,
}
NO_OPTIONS = ("setup", "completion", "test")


def script() -> str:
    """Return the script. Each command has the keys of all tasks."""
    parser = argparse.ArgumentParser("run.sh")
    commands = parser.add_subparsers()
    first, *others = TASKS.values()
    more = {key for task in others for key, _ in recipe_keys(task)}
    more -= {key for key, _ in recipe_keys(first)}
    for name, add_arguments in COMMANDS.items():
        base = create_parser(name, "", add_arguments, first, DEFAULT_RECIPE, explain_keys=True)
        own = commands.add_parser(name, help=name, parents=[base], add_help=False)
        for key in sorted(more):
            own.add_argument(f"--{key}")
        for action in own._actions:
            if action.type is path_argument:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    for name in NO_OPTIONS:
        commands.add_parser(name, help=name, add_help=False)
    return shtab.complete(parser, "bash")


if __name__ == "__main__":
    print(script())
