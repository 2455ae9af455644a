"""The door to translation needs little memory, and few of the packages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import Command, run_process


def test_translating_needs_few_packages(ctranslate2_folder: Path) -> None:
    """An export needs its engine, sentencepiece and pydantic; the command reads recipes, too."""
    code = (
        "import sys; from pipeline import load\n"
        f"print(load({str(ctranslate2_folder)!r}).translate(['Ja.', '']))\n"
        "assert not {'ruamel', 'pyarrow', 'onnxruntime'} & sys.modules.keys()\n"
        "from pipeline.translate import main\n"
        "assert not {'torch', 'fairseq2', 'mlflow', 'deepspeed'} & sys.modules.keys()"
    )
    done = run_process([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr


def test_prefixes_and_scores(ctranslate2_folder: Path, command: Command) -> None:
    """A line's translation begins with what stands behind the tab, drawn or not."""
    arguments = ["--model", ctranslate2_folder, "--prefix", "--scores"]
    arguments += ["--evaluation.sampling_topk", 3, "--evaluation.beam_size", 1]
    done = command("pipeline.translate", *arguments, stdin="Ja.\tThe house\n\tThe\nNein.\n")
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [len(row) for row in rows] == [2, 2, 2]
    assert rows[0][1].startswith("The house")
    assert float(rows[0][0]) < 0
    assert rows[1] == ["0.0000", ""]  # an empty sentence has an empty translation
    for fault, said in (
        ("a\tb", "expected a sentence, and"),
        ("The " * 99, "the prefix has "),
        ("The 猫", 'the target vocabulary makes "The  ⁇ " of the prefix "The 猫"'),
    ):
        some = command("pipeline.translate", *arguments, stdin=f"Ja.\tThe house\nNein.\t{fault}\n")
        assert (some.returncode, len(some.stdout.splitlines())) == (1, 1)
        assert f"stdin:2: {said}" in some.stderr
    arguments += ["--data.max_tokens_per_side", 8]
    refused = command("pipeline.translate", *arguments, "--model", ctranslate2_folder, stdin="Ja.")
    assert "data.max_tokens_per_side does not apply to an exported model: left" in refused.stderr
    assert refused.returncode == 1
    assert "its format is ctranslate2, and models of an ensemble must be" in refused.stderr


def test_output_that_is_the_input_is_refused(ctranslate2_folder: Path, tmp_path: Path) -> None:
    """It would never end."""
    path = tmp_path / "text.de"
    path.write_text("Ja.\n" * 3000)
    command = f"python -m pipeline.translate --model {ctranslate2_folder} --input {path} >> {path}"
    done = run_process(["bash", "-c", command])
    assert done.returncode == 2
    assert done.stderr == (
        f"translate: error: {path} is the file that translations are written to\n"
    )
    assert path.read_text() == "Ja.\n" * 3000


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(ctranslate2_folder: Path) -> None:
    code = (
        "import re, sys; from pipeline.command_line import run_command\n"
        "from pipeline.translate import add_arguments, main\n"
        "from pipeline.translation_recipe import TranslationRecipe\n"
        "try: run_command('translate', '', main, add_arguments, kind=TranslationRecipe)\n"
        "finally:\n"
        "    status = open('/proc/self/status').read()\n"
        "    print(re.findall(r'VmHWM:\\s+(\\d+)', status)[0], file=sys.stderr)"
    )
    peaks = []
    for count in (10_000, 200_000):  # 5 and 100 MB
        lines = ["Ja." if number % 5_000 == 0 else " " * 500 for number in range(count)]
        done = run_process(
            [sys.executable, "-c", code, "--model", str(ctranslate2_folder)], stdin="\n".join(lines)
        )
        assert done.returncode == 0, done.stderr
        translations = done.stdout.split("\n")
        assert len(translations) == count + 1
        assert {i for i, text in enumerate(translations) if text} <= set(range(0, count, 5_000))
        assert f"translate: {count} sentences in" in done.stderr
        peaks.append(int(done.stderr.splitlines()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 40  # MiB
