"""Make docs/benchmarks.md: run the benchmark programs, and put their tables into the page.

    python -m benchmarks.run_all [--only NAME...] [--data DIR]
    python -m benchmarks.run_all --list
    python -m benchmarks.run_all --toy          # tiny sizes, to see that it works; another page

What was measured before on this machine is replaced, section by section; what another machine
measured stays. A benchmark that fails leaves its section as it was, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import psutil
import torch

from benchmarks.rounds import CORES, machine
from benchmarks.sections import BENCHMARKS, INTRODUCTION, NOT_REGENERATED, Benchmark
from data_prep.files import write_atomically

PAGE = Path("docs/benchmarks.md")
BUILD = Path("build/benchmarks")

Results = dict[str, dict[str, str]]  # title of a section → machine → what was measured on it


class Failed(Exception):
    """A command did not do what it should."""


# ── The page ────────────────────────────────────────────────────────────────────────────────────


def read_results(page: Path) -> Results:
    """Read what is on the page: a section per `##`, and in it what each machine measured per `###`.

    It ends the program when a section with results has a title that no benchmark has.
    """
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    found: Results = {}
    for section in text.split("\n## ")[1:]:
        heading, *machines = section.split("\n### ")
        parts = [each.partition("\n") for each in machines]
        found[heading.partition("\n")[0]] = {name: body.strip() for name, _, body in parts}
    unknown = {title for title, machines in found.items() if machines} - {
        benchmark.title for benchmark in BENCHMARKS
    }
    if unknown:
        sys.exit(f"{page}: would lose {', '.join(sorted(unknown))}: no benchmark has that title")
    return found


def page_of(results: Results) -> str:
    """Return the page with these results."""
    parts = [INTRODUCTION]
    for benchmark in BENCHMARKS:
        parts.append(f"## {benchmark.title}\n\n{benchmark.text.strip()}")
        machines = results.get(benchmark.title, {})
        parts += [f"### {machine}\n\n{machines[machine]}" for machine in sorted(machines)]
        if not machines:
            parts.append("Not measured yet.")
    return "\n\n".join(part.strip() for part in [*parts, NOT_REGENERATED]) + "\n"


# ── Measuring ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Runner:
    """Runs commands of the page, which name what they need as `{placeholders}`."""

    sizes: Literal["cpu", "gpu", "toy"]
    places: Mapping[str, str]
    """What each placeholder stands for."""

    makes: Mapping[str, str]
    """The command that makes what a placeholder names."""

    def measure(self, benchmark: Benchmark) -> str:
        """Run a benchmark, and return what the page says of this machine: commands and tables.

        :raises Failed: a command failed, or there was no table; its stderr was shown.
        """
        template = f"benchmarks.{benchmark.command} {getattr(benchmark, self.sizes)}"
        made = [make for need, make in self.makes.items() if f"{{{need}}}" in template]
        commands = dict.fromkeys((*made, template))  # two needs can have one command
        *before, command = [each.format_map(self.places) for each in commands]
        for each in before:
            run(each)
        tables = run(command)
        if "|---|" not in tables:
            raise Failed(f"python -m {command} printed no table")
        memory = psutil.virtual_memory().total / 2**30
        now = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
        return "\n".join(
            [
                f"{now}, {memory:.0f} GiB of memory, torch {torch.__version__}:",
                "",
                "```sh",
                *(f"python -m {each}" for each in (*before, command)),
                "```",
                "",
                tables.strip(),
            ]
        )


def run(command: str) -> str:
    """Run a command, and return what it printed.

    :param command: what follows `python -m`.
    :raises Failed: its exit code is not 0.
    """
    say(f"python -m {command}")
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(CORES)},
    )
    if done.returncode:
        raise Failed(f"python -m {command} ended with exit code {done.returncode}")
    lines = done.stdout.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("["))  # DeepSpeed's log


def runner_of(toy: bool, data: Path, build: Path) -> Runner:
    """Return a runner with the sizes for this machine.

    :param data: folder of the real corpora.
    :param build: folder for what the benchmarks need to be prepared.
    """
    run_dir = build / ("toy" if toy else "multi30k")
    shards, corpora = shlex.quote(str(run_dir)), shlex.quote(str(data))
    prepare = "pipeline.prepare --config {recipe}"
    if toy:
        recipe = f"recipes/quickstart.yaml --run_dir {shards} --data.toy_corpus.train 2000"
        places = {"bpe": shards, "text": f"{shards}/fetch/toy/test.de", "data": f"{shards}/fetch"}
        makes = dict.fromkeys(("recipe", "shards", "bpe", "data"), prepare)
    else:
        recipe = f"recipes/multi30k_de_en.yaml --run_dir {shards} --data.root {corpora}"
        places = {"bpe": shlex.quote(str(build / "bpe32k")), "data": corpora}
        places["text"] = f"{corpora}/newstest/newstest2014.de"
        makes = dict.fromkeys(("recipe", "shards"), prepare)
        bpe = "pipeline.prepare --config benchmarks/bpe32k.yaml --run_dir {bpe} --data.root {data}"
        makes["bpe"] = bpe
    places |= {"recipe": recipe, "shards": shards, "build": shlex.quote(str(build))}
    build.mkdir(parents=True, exist_ok=True)
    return Runner("toy" if toy else "gpu" if torch.cuda.is_available() else "cpu", places, makes)


def say(message: str) -> None:
    """Print a line to stderr."""
    print(f"run_all: {message}", file=sys.stderr, flush=True)


def main() -> None:
    """Run benchmarks, and write the page after each."""
    names = [benchmark.name for benchmark in BENCHMARKS]
    shared = Path("../shared/data")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", default=names)
    parser.add_argument("--list", action="store_true", help="name the benchmarks")
    parser.add_argument("--toy", action="store_true", help="tiny sizes; page: BUILD/toy.md")
    parser.add_argument("--page", type=Path, help=f"[{PAGE}]")
    parser.add_argument("--build", type=Path, default=BUILD, help="what they need [%(default)s]")
    parser.add_argument(
        "--data", type=Path, default=shared if shared.is_dir() else Path("data"),
        help="folder of multi30k, europarl20k, newstest and more [%(default)s]",
    )  # fmt: skip
    arguments = parser.parse_args()
    if arguments.list:
        for benchmark in BENCHMARKS:
            print(f"{benchmark.name:12} {benchmark.title}")
        return
    page = arguments.page or (arguments.build / "toy.md" if arguments.toy else PAGE)
    read_results(page)  # refuses a page that would lose results
    runner = runner_of(arguments.toy, arguments.data, arguments.build)
    chosen = [
        benchmark
        for benchmark in BENCHMARKS
        if benchmark.name in arguments.only and getattr(benchmark, runner.sizes) is not None
    ]
    failed = []
    for number, benchmark in enumerate(chosen, start=1):
        say(f"{number} of {len(chosen)}: {benchmark.name}")
        started = time.monotonic()
        try:
            measured = runner.measure(benchmark)
        except Failed as error:
            failed.append(benchmark.name)
            say(f"{benchmark.name}: failed, its section stays as it was: {error}")
            continue
        results = read_results(page)  # as it is now: another run_all may have written meanwhile
        results.setdefault(benchmark.title, {})[machine()] = measured
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(page, page_of(results))
        say(f"{benchmark.name}: done in {time.monotonic() - started:.0f} s")
    say(f"{page}: {len(chosen) - len(failed)} of {len(chosen)} sections are new")
    if failed:
        say(f"failed: {', '.join(failed)}; once more: --only {' '.join(failed)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
