"""Run commands, and say what is wrong with what they are given.

Every command is called as `COMMAND --config RECIPE [--SECTION.KEY VALUE]...`, and begins with
`run_command`, which parses that and reports errors.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from pipeline.classification_recipe import ClassificationRecipe
from pipeline.recipe import ROOT, Recipe, UsageError
from pipeline.recipe_file import (
    TASKS,
    default_of,
    kind_of,
    load_recipe,
    nearest_key_hint,
    recipe_keys,
)

OUR_MODULES = {"data_prep", "models", "pipeline", "__main__"}
DEFAULT_RECIPE = ROOT / "recipes" / "quickstart.yaml"
OTHER_DEFAULTS: dict[type[Recipe], Path] = {  # of commands for one task alone
    ClassificationRecipe: ROOT / "recipes" / "fashion_mnist.yaml"
}

R = TypeVar("R", bound=Recipe)

AddArguments = Callable[[argparse.ArgumentParser], None]

STOPPED = 75  # exit code after a signal: EX_TEMPFAIL, "try again"
AGAIN = "run the same command again to continue"

log = logging.getLogger("options")


def evaluation_keys(recipe: Recipe, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the keys of `evaluation` that are on the command line, with their values."""
    given = (key.partition(".") for key in vars(arguments))
    return {
        name: getattr(recipe.evaluation, name)
        for section, _, name in given
        if section == "evaluation"
    }


def warn_of_left_out(arguments: argparse.Namespace, but: str = "") -> None:
    """Warn of recipe keys on the command line, none of which applies to an exported model.

    :param but: the section that does apply.
    """
    for key in sorted(vars(arguments)):
        section, dot, _ = key.partition(".")
        if dot and section != but:
            log.warning("%s does not apply to an exported model: left out", key)


def overrides_on_command_line(
    recipe: type[Recipe], arguments: argparse.Namespace
) -> list[tuple[str, str]]:
    """Return the dotted keys that are on the command line, each with the text given for it.

    :param recipe: has the keys.
    """
    values = vars(arguments)
    return [(key, values[key]) for key, _ in recipe_keys(recipe) if key in values]


def text_argument(text: str) -> str:
    """Return the text of an argument, for `add_argument(type=…)`.

    :raises argparse.ArgumentTypeError: it is empty, as where a shell's variable is not set.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def path_argument(text: str) -> Path:
    """Return the path that an argument names, for `add_argument(type=…)`; errors as of
    `text_argument`."""
    return Path(text_argument(text))


class _Once(argparse.Action):
    """An option that can be given once: the last of several would win in silence."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        given: set[str] = vars(namespace).setdefault("_given", set())
        if self.dest in given:
            parser.error(f"{option_string} is given twice, and there can be one")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


def positive_argument(text: str) -> int:
    """Return the number in an argument, for `add_argument(type=…)`.

    :raises argparse.ArgumentTypeError: it is not 1 or more.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 on")
    return int(text)


class _Parser(argparse.ArgumentParser):
    """A parser that raises UsageError, and leaves it to `run_command` to exit."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register("action", None, _Once)  # what options are that name no action

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def create_parser(
    program: str,
    description: str,
    add_arguments: AddArguments,
    recipe: type[Recipe],
    default: Path,
    *,
    explain_keys: bool,
) -> argparse.ArgumentParser:
    """Return a parser of the arguments that a command has, and of those that all have.

    :param recipe: the keys of its task are among them.
    :param default: the recipe where none is given.
    :param explain_keys: its help explains recipe keys, too, and not a command's own arguments only.
    """
    parser = _Parser(
        prog=program,
        usage=f"{program} [OPTION VALUE]... [--SECTION.KEY VALUE]...",
        description=description,
        epilog=None if explain_keys else _key_names(recipe),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser)
    parser.add_argument(
        "--config", type=path_argument, default=default, metavar="RECIPE",
        help=f"recipe (YAML) [default {default.relative_to(ROOT)}]",
    )  # fmt: skip
    parser.add_argument("--help_keys", action="help", help="explain every recipe key, and exit")
    parser.add_argument(
        "--deepspeed_config", dest="training.deepspeed_config", default=argparse.SUPPRESS,
        metavar="FILE", help="short for --training.deepspeed_config",
    )  # fmt: skip
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    groups: dict[str, Any] = {}
    for key, field in recipe_keys(recipe):
        section = key.split(".")[0] if "." in key else "recipe"
        if section not in groups:
            groups[section] = parser.add_argument_group(f"{section} keys")
        text = " ".join((field.description or "").split())
        otherwise = "required" if field.is_required() else f"default {default_of(field)}"
        text = f"{text} [{otherwise}]".replace("%", "%%")
        groups[section].add_argument(
            f"--{key}", dest=key, action="store", default=argparse.SUPPRESS, metavar="VALUE",
            help=text if explain_keys else argparse.SUPPRESS,
        )  # fmt: skip
    return parser


def _key_names(recipe: type[Recipe]) -> str:
    """Return the names of all recipe keys, section by section."""
    sections: dict[str, list[str]] = {}
    for key, _ in recipe_keys(recipe):
        section, _, name = key.rpartition(".")
        sections.setdefault(section, []).append(name)
    head = f"recipe keys, as --SECTION.KEY VALUE; --help_keys and docs/{recipe.page} explain them:"
    lines = [
        textwrap.fill(
            (f"{section}: " if section else "") + ", ".join(names),
            width=100, initial_indent="  ", subsequent_indent="    ",
        )
        for section, names in sections.items()
    ]  # fmt: skip
    return "\n".join([head, *lines])


def run_command(
    program: str,
    description: str,
    command: Callable[[R, argparse.Namespace], None],
    add_arguments: AddArguments = lambda parser: None,
    *,
    kind: type[R],
    continues: bool = True,
) -> NoReturn:
    """Parse `sys.argv`, call `command(recipe, arguments)`, and exit.

    Exit codes: 0 done, 2 bad usage or recipe, 75 stopped by Ctrl-C, 1 anything else. Errors are one
    message on stderr; a traceback only with `--debug` or RINGFORMER_DEBUG=1.

    :param kind: of the recipes that the command takes; `Recipe` is any.
    :param continues: whether the same command, after Ctrl-C, goes on where it was; if not, that is
        an error.
    """
    _open_closed_streams()
    debug = "--debug" in sys.argv or os.environ.get("RINGFORMER_DEBUG") == "1"
    try:
        default = OTHER_DEFAULTS.get(kind, DEFAULT_RECIPE)
        recipe = _recipe_on_command_line(default)
        explain_keys = "--help_keys" in sys.argv
        parser = create_parser(
            program, description, add_arguments, recipe, default, explain_keys=explain_keys
        )
        arguments, unknown = parser.parse_known_args()
        if unknown:
            wanted = unknown[0].split("=")[0]
            hint = (
                nearest_key_hint(wanted.lstrip("-"), recipe, "--")
                if wanted.startswith("--")
                else ""
            )
            raise UsageError(f"unknown argument `{unknown[0]}`{hint} (see --help)")
        overrides = overrides_on_command_line(recipe, arguments)
        command(load_recipe(arguments.config, overrides, kind=kind), arguments)
    except UsageError as error:
        _exit_with_error(program, str(error), debug, exit_code=2)
    except KeyboardInterrupt:
        if not continues:
            _exit_with_error(program, "interrupted", debug, exit_code=1)
        print(f"{program}: stopped by a signal; {AGAIN}", file=sys.stderr, flush=True)
        sys.exit(STOPPED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MemoryError as error:
        _exit_with_error(program, f"not enough memory: {error}".rstrip(": "), debug, exit_code=1)
    except Exception as error:
        # Our own errors say everything; a library's message often makes no sense without the type.
        ours = type(error).__module__.split(".")[0] in OUR_MODULES
        name = "" if ours or isinstance(error, OSError) else f"{type(error).__name__}: "
        _exit_with_error(program, f"{name}{error}", debug, exit_code=1)
    sys.exit(0)


def _recipe_on_command_line(default: Path) -> type[Recipe]:
    """Return what the keys are of the recipe that `--config` names.

    Whatever is wrong with it is told later, behind what is wrong with the command line itself.

    :param default: the recipe where none is given.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path, default=default)
    try:
        return kind_of(parser.parse_known_args()[0].config)
    except (UsageError, argparse.ArgumentError):
        return TASKS[next(iter(TASKS))]


def on_signals(handler: Callable[[int, FrameType | None], object]) -> None:
    """Call `handler` when a signal asks this process to stop: SIGTERM, Ctrl-C, or SIGHUP, which
    `nohup` has it ignore."""
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, handler)


def _open_closed_streams() -> None:
    """Open stdin, stdout and stderr on /dev/null where they are closed.

    Otherwise the next file that is opened would get what is written to one of them.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def _exit_with_error(program: str, message: str, debug: bool, *, exit_code: int) -> NoReturn:
    """Print a message, and with `debug` the traceback of the current exception, and exit."""
    if debug:
        traceback.print_exc()
    print(f"{program}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(exit_code)
