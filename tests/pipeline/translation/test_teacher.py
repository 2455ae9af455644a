"""Exported models make sides of corpora: the right ones, the same for any workers and after any
kill, or else there is a clear error."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sacrebleu import BLEU

from data_prep.config import DataConfig, TrainingCorpus
from data_prep.files import DataError
from data_prep.filters import Repetition
from data_prep.prepare import prepare
from models.export_format import ModelError
from pipeline.checkpoints.folder import list_checkpoints
from pipeline.recipe import UsageError
from pipeline.recipe_file import load_recipe
from pipeline.translation.task import TranslationTask
from pipeline.translation.teacher import open_teacher
from pipeline.translation.translator import Translator, load_exports
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import ROOT, run_process
from tests.data_prep.test_pieces import command, files_of
from tests.pipeline.conftest import exported
from tests.pipeline.ranks import train

LINES = 90  # of the corpora
TOY = {"source": "one.de", "target": "one.en"}


@pytest.fixture(scope="module")
def folder(
    prepared: TranslationRecipe, ctranslate2_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a folder with corpora in `data`, and a teacher for each direction: `there`, `back`."""
    folder = tmp_path_factory.mktemp("synthetic")
    (folder / "data").mkdir()
    for lang in ("de", "en"):
        text = (prepared.run_dir / "fetch" / "toy" / f"train.{lang}").read_text().splitlines()
        lines = [*text[: LINES - 1], ""]
        (folder / "data" / f"one.{lang}").write_text("".join(f"{line}\n" for line in lines))
        for number, split in enumerate(("valid", "test"), start=100):
            (folder / "data" / f"{split}.{lang}").write_text(f"{text[number]}\n")
    shutil.copytree(ctranslate2_folder, folder / "there")
    copy_of(ctranslate2_folder, folder / "back", source_lang="en", target_lang="de")
    return folder


def copy_of(export: Path, folder: Path, **settings: Any) -> Path:
    """Copy an export, and change some of its settings."""
    shutil.copytree(export, folder)
    path = folder / "export.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def recipe_of(folder: Path, train: list[dict[str, Any]], name: str = "recipe") -> Path:
    """Write a recipe in YAML, of which JSON is a part."""
    splits = {
        split: {"name": split, "source": f"{split}.de", "target": f"{split}.en"}
        for split in ("valid", "test")
    }
    data = {
        "root": str(folder / "data"),
        "train": train,
        **splits,
        "vocabulary": {"size": 150, "user_defined_symbols": ["<BT>"]},
        "workers": 2,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"run_dir": str(folder / name), "data": data}, indent=1))
    return path


def config_of(folder: Path, *train: dict[str, Any]) -> DataConfig:
    recipe = load_recipe(recipe_of(folder, [*train]))
    assert isinstance(recipe, TranslationRecipe)
    return recipe.data


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]


@pytest.mark.slow
def test_what_a_teacher_makes(
    folder: Path, talkative_run: TranslationRecipe, caplog: pytest.LogCaptureFixture
) -> None:
    """Distillation, interpolation by a pair of models that draw, and back-translation."""
    weights = exported(talkative_run, "safetensors")
    kd = {
        "name": "kd",
        "source": "one.de",
        "translate_with": {
            "model": str(folder / "there"), "beam_size": 3, "min_score": -0.9,
            "filters": [{"filter": "repetition", "max": 3}, {"filter": "length", "max_chars": 200}],
        },
    }  # fmt: skip
    near = {
        "name": "near",
        **TOY,
        "translate_with": {"model": [str(weights)] * 2, "beam_size": 3, "sampling_topk": 0},
    }
    bt = {
        "name": "bt",
        "target": "one.en",
        "tag": "<BT>",
        "translate_with": {"model": str(folder / "back")},
    }
    config, run_dir = config_of(folder, {"name": "real", **TOY}, kd, near, bt), folder / "run"
    prepare(config, run_dir, open_teacher=open_teacher)
    german, english = (lines_of(folder / "data" / f"one.{lang}") for lang in ("de", "en"))

    def made(name: str) -> tuple[list[str], np.ndarray[Any, Any]]:
        piece = run_dir / "synthetic" / name / "translations" / "00000"
        return lines_of(piece / "text.txt"), np.load(piece / "scores.npy")

    beam = load_exports(folder / "there", beam_size=3).n_best(german)
    text, scores = made("kd")
    assert text == [found[0].text for found in beam]
    assert scores.tolist() == pytest.approx([found[0].score for found in beam], abs=1e-5)

    drawn = Translator.of_exports([weights] * 2, beam_size=3, sampling_topk=0).n_best(german)
    bleu = BLEU(effective_order=True)
    for one, found, reference in zip(made("near")[0], drawn, english, strict=True):
        texts = [each.text for each in found]
        values = [bleu.sentence_score(each, [reference]).score for each in texts]
        assert one == texts[values.index(max(values))]

    assert made("bt")[0] == load_exports(folder / "back").translate(english)
    clean = [run_dir / "clean" / "train" / "00003" / f"text.{lang}" for lang in ("de", "en")]
    back = list(zip(*map(lines_of, clean), strict=True))
    assert len(back) > 10
    pairs = [(f"<BT> {s}", t) for s, t in zip(made("bt")[0], english, strict=True)]
    assert set(back) < set(pairs)

    report = json.loads((run_dir / "clean" / "report.json").read_text())
    counts = {corpus["corpus"]: corpus for corpus in report["corpora"]}
    assert "score" not in counts["bt"]["dropped"]
    assert list(counts["kd"]["dropped"])[:4] == ["score", "repetition", "length", "empty_side"]
    high = [(s, t) for s, t, score in zip(german, text, scores, strict=True) if score >= -0.9]
    loops = sum(Repetition(max=3).drops(*pair) for pair in high)
    dropped = counts["kd"]["dropped"]
    assert counts["kd"]["read"] == LINES
    assert [dropped["score"], dropped["repetition"]] == [LINES - len(high), loops]
    assert min(dropped["score"], loops) > 0
    assert counts["bt"]["dropped"]["empty_side"] >= 1

    manifest = json.loads((run_dir / "synthetic" / "kd" / "manifest.json").read_text())
    (piece,) = manifest["pieces"]
    assert piece["model"] == open_teacher(config.train[1], ("de", "en")).digest
    assert (piece["lines"], piece["search"]["beam_size"]) == (LINES, 3)

    # Other filters clean again, and translate nothing: what another model has begun is no matter.
    begun = run_dir / "synthetic" / ".kd.partial"
    (begun / "translations" / "00000").mkdir(parents=True)
    (begun / ".inputs.json").write_text('{"model": "another"}')
    kd["translate_with"]["min_score"] = -0.5  # type: ignore[index]
    caplog.clear()
    caplog.set_level("INFO", "prepare")
    config = config_of(folder, {"name": "real", **TOY}, kd, near, bt)
    prepare(config, run_dir, open_teacher=open_teacher)
    assert caplog.text.count("up to date, reused") == 4
    assert "clean: done again: special changed" in caplog.text


@pytest.mark.slow
def test_any_workers_and_kills_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """Of a search and of what CTranslate2 draws; but not with another model between."""
    there, back = (copy_of(folder / name, tmp_path / name) for name in ("there", "back"))
    few = {"lines_per_piece": 15}
    train = [
        {"name": "kd", "source": "one.de", "translate_with": {"model": str(there), **few}},
        {
            "name": "bt",
            "target": "one.en",
            "translate_with": {"model": str(back), "sampling_topk": 0, **few},
        },
    ]
    recipe, config = recipe_of(folder, train, "killed"), config_of(folder, *train)
    one = config.model_copy(update={"workers": 1})
    prepare(one, tmp_path / "whole", open_teacher=open_teacher)
    expected = files_of(tmp_path / "whole")
    texts = [expected[name] for name in expected if name.endswith("text.txt")]
    assert len(set(texts)) == len(texts) == 2 * 6

    def start() -> subprocess.Popen[bytes]:
        arguments = command(recipe, run_dir, "--data.workers", "3")
        return subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL)

    def kill(process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGKILL)
        process.wait()

    run_dir = tmp_path / "run"
    pieces = run_dir / "synthetic" / ".kd.partial" / "translations"
    process = start()
    while not (finished := list(pieces.glob("[!.]*"))) and process.poll() is None:
        time.sleep(0.01)
    kill(process)
    assert finished
    settings = (there / "export.json").read_bytes()
    (there / "export.json").write_bytes(settings + b"\n")
    with pytest.raises(DataError) as caught:
        prepare(config, run_dir, open_teacher=open_teacher)
    assert re.fullmatch(
        rf"data.train: kd: \d+ pieces were translated by another model than {there}; bring that "
        rf"one back to go on, or delete {pieces.parent} to translate all of them with this one",
        str(caught.value),
    )
    (there / "export.json").write_bytes(settings)
    seconds = random.uniform(0, 15)
    print("killed after", seconds)
    process = start()
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    kill(process)
    prepare(config, run_dir, open_teacher=open_teacher)
    assert files_of(run_dir) == expected


@pytest.mark.slow
def test_a_full_disk(folder: Path, tmp_path: Path) -> None:
    """The run is in a file system in which the translations do not fit; it exists in a mount
    namespace of its own."""
    (small := tmp_path / "small").mkdir()
    corpus = {
        "name": "kd",
        "source": "one.de",
        "translate_with": {"model": str(folder / "there"), "lines_per_piece": 7},
    }
    again = " ".join(command(recipe_of(folder, [corpus], "full"), small / "run"))
    script = f"""
        mount -t tmpfs -o size=100k none {small} || exit 77
        {again}
        echo "exit $?" >&2
        mount -o remount,size=64m {small}
        {again}
    """
    done = run_process(["unshare", "--mount", "sh", "-c", script])
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("needs the right to mount a file system")
    assert "synthetic/kd: no space left on the disk; free some and run the same command" in (
        done.stderr
    )
    assert "exit 1" in done.stderr
    assert "Traceback" not in done.stderr
    assert "kd: continued" in done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_student_of_the_recipe(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe takes the quickstart's export, from where it is run."""
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    shutil.copytree(folder / "there", tmp_path / "runs" / "quickstart" / "export")
    monkeypatch.chdir(tmp_path)
    keys = {
        "run_dir": str(tmp_path / "run"),
        "data.root": str(tmp_path / "data"),
        "data.vocabulary.size": "150",
        **{f"data.toy_corpus.{split}": "100" for split in ("train", "valid", "test")},
    }
    path = ROOT / "recipes" / "quickstart_distilled.yaml"
    recipe = load_recipe(path, [*keys.items()])
    assert isinstance(recipe, TranslationRecipe)
    prepare(recipe.data, recipe.run_dir, open_teacher=open_teacher)
    flags = [f"--{key}={value}" for key, value in keys.items() if key != "run_dir"]
    teacher = Path("runs", "quickstart", "export").rename("teacher")
    TranslationTask(recipe).check_recipe()
    copy_of(teacher, Path("runs", "quickstart", "export"), evaluation={"beam_size": 1})
    with pytest.raises(DataError, match=r"translated by another model than .*/export is now"):
        TranslationTask(recipe).check_recipe()
    shutil.rmtree(Path("runs", "quickstart", "export"))
    steps = {"max_steps": 2, "warmup_steps": 1, "validate_every": 2, "checkpoint_every": 2}
    codes, said = train(path, recipe.run_dir, *flags, **steps)
    assert codes == [0], said
    assert list_checkpoints(recipe.checkpoints)


def test_what_is_drawn_depends_on_the_place_alone(folder: Path) -> None:
    """Of the first piece of one corpus, and of the next one's by the same teacher."""
    drawing = {"model": folder / "there", "sampling_topk": 0}
    corpus = {"name": "a", "source": "one.de", "translate_with": drawing}
    teacher = open_teacher(TrainingCorpus.model_validate(corpus), ("de", "en"))
    sentences = lines_of(folder / "data" / "one.de")[:5]
    first, second = (teacher.n_best(sentences, 1) for _ in range(2))
    assert [each[0].text for each in first] == [each[0].text for each in second]


def test_models_that_cannot_teach(folder: Path, tmp_path: Path) -> None:
    there = folder / "there"
    converted = copy_of(there, tmp_path / "classifier", task="classification")
    damaged = copy_of(there, tmp_path / "damaged")
    (damaged / "spm.model").write_bytes(b"none")
    cases = {
        "nowhere": (tmp_path / "nowhere", "not an exported model: .*No such file"),
        "classifier": (converted, "a model for classification, and one for translation is needed"),
        "other": (
            copy_of(there, tmp_path / "other", source_lang="fr"),
            "goes from fr to en, and the target of other needs a model from de to en$",
        ),
        "reversed": (
            folder / "back",
            "goes from en to de, and the target of reversed .* it makes the other side$",
        ),
        "keys": (
            copy_of(there, tmp_path / "keys", format="safetensors", evaluation={"beam": 1}),
            "keys: not an exported model: export.json: unknown key `evaluation.beam`",
        ),
        "damaged": (damaged, f"{damaged}: not an exported model"),
        "ensemble": (
            [there, folder / "back"], "its format is ctranslate2, and models of an ensemble must"
        ),
    }  # fmt: skip
    seed = {"model": there, "sampling_seed": 2}
    searching = {"name": "kd", "source": "one.de", "translate_with": seed}
    with pytest.raises(DataError, match=r"kd: translate_with: .* are for sampling: set sampling_"):
        open_teacher(TrainingCorpus.model_validate(searching), ("de", "en"))
    for name, (model, expected) in cases.items():
        corpus = TrainingCorpus.model_validate(
            {"name": name, "source": "one.de", "translate_with": {"model": model}}
        )
        with pytest.raises((DataError, ModelError), match=expected) as caught:
            open_teacher(corpus, ("de", "en")).n_best(["Ja."], 1)
        assert "\n" not in str(caught.value)


def test_a_model_that_changes_meanwhile(folder: Path, tmp_path: Path) -> None:
    model = copy_of(folder / "there", tmp_path / "model")
    corpus = TrainingCorpus.model_validate(
        {"name": "kd", "source": "one.de", "translate_with": {"model": model}}
    )
    teacher = open_teacher(corpus, ("de", "en"))
    (model / "README.md").write_text("It is no part of the model.")
    assert teacher.n_best(["Ja."], 1)[0]
    (model / "export.json").write_bytes((model / "export.json").read_bytes() + b"\n")
    other = teacher._replace(keys=(("beam_size", 2),))  # which is loaded anew
    with pytest.raises(ModelError, match=f"{model} has changed since this command began"):
        other.n_best(["Ja."], 1)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"tag": "<2de>"}, "tag <2de> must be one of vocabulary.user_defined_symbols"),
        ({"source": None}, "source or target is required: what the model translates"),
        ({"translate_with": None}, "target is required, or translate_with"),
        ({"name": "a/b"}, "name 'a/b' must be fit for a folder"),
        ({"translate_with": {}}, r"key `data.train.0.translate_with.model` is required"),
        ({"translate_with": {"model": []}}, r"expected the folder of an export, .*, not \[\]"),
        ({"translate_with": {"model": 3}}, "expected the folder of an export, .*, not 3"),
        ({"translate_with": {"model": "m", "beam": 2}}, "unknown key .*translate_with.beam"),
        (
            {"translate_with": {"model": "m", "filters": [{"filter": "length"}] * 2}},
            "each filter can be named once",
        ),
        (
            {"translate_with": {"model": "m", "filters": [{"filter": "duplicates"}]}},
            "duplicates looks at all corpora",
        ),
    ],
)
def test_recipes_that_make_no_corpus(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    corpus = {"name": "kd", "source": "one.de", "translate_with": {"model": "m"}, **change}
    given = {key: value for key, value in corpus.items() if value is not None}
    with pytest.raises(UsageError, match=expected) as caught:
        load_recipe(recipe_of(tmp_path, [given]))
    assert "\n" not in str(caught.value)
