"""Data preparation as a user runs it, on good input and on bad."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from data_prep import prepare as stages
from data_prep.clean import clean
from data_prep.corpora import fetch, read_text
from data_prep.files import DataError, sha256_of
from data_prep.shards import CorpusInfo, ShardReader, ShardsManifest
from data_prep.text import EOS_IDX, SOURCE_WORDS, words_of
from data_prep.vocabulary import load_vocabularies, load_vocabulary
from pipeline.recipe_file import load_recipe
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import Command

GOOD = [(f"Das ist der Satz {i}.", f"This is sentence {i}.") for i in range(400)]


def prepare(recipe: TranslationRecipe) -> ShardsManifest:
    """Run all stages of a recipe."""
    return stages.prepare(recipe.data, recipe.run_dir)


def write_corpus(folder: Path, name: str, pairs: list[tuple[str, str]]) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    for side, language in enumerate(("de", "en")):
        text = "".join(f"{pair[side]}\n" for pair in pairs)
        (folder / f"{name}.{language}").write_text(text, encoding="utf-8")


SIDES = {"source": "de", "target": "en"}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Make a folder with a good corpus and a `recipe.yaml` that uses it."""
    write_corpus(tmp_path / "data", "train", GOOD)
    write_corpus(tmp_path / "data", "valid", [("Guten Tag.", "Good day."), ("Nein.", "No.")])
    write_corpus(tmp_path / "data", "test", [("Guten Abend, Anna.", "Good evening, Anna.")])
    (tmp_path / "recipe.yaml").write_text(
        f"""
run_dir: {tmp_path}/run
data:
  root: {tmp_path}/data
  train: [{{name: train, source: train.de, target: train.en}}]
  valid: {{name: valid, source: valid.de, target: valid.en}}
  test: {{name: test, source: test.de, target: test.en}}
  vocabulary: {{size: 60}}
  workers: 1
"""
    )
    return tmp_path


def recipe_of(folder: Path, **overrides: str) -> TranslationRecipe:
    return load_recipe(
        folder / "recipe.yaml", [(key.replace("__", "."), v) for key, v in overrides.items()]
    )


def report_of(recipe: TranslationRecipe) -> dict[str, int]:
    report = json.loads((recipe.run_dir / "clean" / "report.json").read_text())
    dropped: dict[str, int] = report["corpora"][0]["dropped"]
    return dropped


# ── Good input ──────────────────────────────────────────────────────────────────────────────────


def test_shards_are_plain_arrow_and_decode_to_the_text(corpus: Path) -> None:
    recipe = recipe_of(corpus)
    manifest = prepare(recipe)
    shards = recipe.run_dir / "shards"
    vocabulary = load_vocabulary(shards / "spm.model")
    assert sha256_of(shards / "spm.model") == manifest.vocabulary.sha256
    for shard in manifest.shards:
        assert sha256_of(shards / shard.name) == shard.sha256
    table = pa.ipc.open_file(pa.memory_map(str(shards / "train-00000.arrow"))).read_all()
    assert table.schema.field("source").type == pa.list_(pa.uint16())
    decoded = [
        tuple(vocabulary.decode(table[side][row].as_py()) for side in ("source", "target"))
        for row in range(len(table))
    ]
    assert sorted(decoded) == sorted(GOOD)
    assert decoded != GOOD  # shuffled
    words = {word for german, _ in GOOD for word in words_of(german)}
    assert (shards / SOURCE_WORDS).read_text().split("\n") == [*sorted(words), ""]
    reader = ShardReader(shards, "train", verify=True)
    assert len(reader) == len(GOOD)
    assert reader[7][0].base is not None  # a view into the mapped file
    assert manifest.totals["train"].target_tokens == reader.lengths()[1].sum()


def test_many_shards_read_as_one(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = recipe_of(corpus)
    prepare(one)
    monkeypatch.setattr("data_prep.binarize.CLOSED_VOCABULARY", 5)
    many = recipe_of(corpus, run_dir=f"{corpus}/many", data__pairs_per_shard="64")
    assert len(prepare(many).of_split("train")) == 6
    assert not (many.shards / SOURCE_WORDS).exists()  # more words than that
    pairs = []
    for recipe in (one, many):
        reader = ShardReader(recipe.run_dir / "shards", "train")
        pairs.append([tuple(side.tobytes() for side in reader[i]) for i in range(len(reader))])
    assert sorted(pairs[0]) == sorted(pairs[1])
    assert pairs[0] != pairs[1]


def test_same_input_same_bytes(corpus: Path) -> None:
    first = prepare(recipe_of(corpus))
    second = prepare(recipe_of(corpus, run_dir=f"{corpus}/again"))
    assert first.shards == second.shards
    assert first.vocabulary == second.vocabulary


@pytest.mark.parametrize("name", ["train.en", "test.de"])
def test_text_that_is_changed_meanwhile(corpus: Path, name: str) -> None:
    """After the files were found, and before they are read."""
    config = recipe_of(corpus, data__pairs_per_piece="100").data
    raw, text, path = corpus / "run" / "fetch", corpus / "run" / "clean", corpus / "data" / name
    raw.parent.mkdir()
    whole = path.read_text()
    with ThreadPoolExecutor(1) as executor:
        fetched = fetch(config, raw, executor)
        path.write_text(whole[:-2] + "!\n")
        with pytest.raises(DataError, match=f"{name} was changed while it was prepared"):
            clean(config, fetched, (), raw, text, executor)
        path.write_text(whole)
        clean(config, fetched, (), raw, text, executor)
    lines = [line for n in range(4) for line in read_text(text / "train" / f"{n:05d}" / "text.en")]
    assert lines == [target for _, target in GOOD]


def test_rerun_reuses_and_a_change_redoes_only_what_follows(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(recipe_of(corpus))
    caplog.set_level("INFO")

    def told(**overrides: str) -> list[str]:
        caplog.clear()
        prepare(recipe_of(corpus, **overrides))
        starts = ("fetch:", "clean:", "vocabulary:", "shards:")
        stages = [m for m in caplog.messages if m.startswith(starts)]
        said = ("pairs", "done in", "cannot")  # of what is in them
        return [m for m in stages if not any(word in m for word in said)]

    assert [m.split(" (")[0] for m in told()] == [
        f"{stage}: up to date, reused" for stage in ("fetch", "clean", "vocabulary", "shards")
    ]
    resized = told(data__vocabulary__size="70")
    assert "reused" in resized[1]
    assert resized[2:] == [
        "vocabulary: done again: vocabulary changed",
        "shards: done again: vocabulary changed",
    ]
    write_corpus(corpus / "data", "train", GOOD[:300])
    assert told()[1] == "clean: done again: files, pieces changed"


def test_toy_files_that_the_recipe_did_not_name_before(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = corpus / "recipe.yaml"
    sizes = "toy_corpus: {train: 300, valid: 20, test: 20}"
    text = path.read_text().replace(
        "vocabulary: {size: 60}", f"vocabulary: {{size: 150}}\n  {sizes}"
    )
    path.write_text(text.replace(": train.", ": toy/train."))
    caplog.set_level("INFO")
    for split in ("valid", "test"):
        keys = {f"data__test__{s}": f"toy/{split}.{lang}" for s, lang in SIDES.items()}
        prepare(recipe_of(corpus, **keys))
    assert "fetch: done again: toy_corpus changed" in caplog.text
    with pytest.raises(DataError, match="toy corpus is German–English"):
        prepare(recipe_of(corpus, data__target_lang="fr"))


def test_edited_files_of_stages(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What can be made anew is, once the edited file is moved away."""
    path, vocabulary = corpus / "data" / "train.en", corpus / "run" / "vocabulary" / "spm.model"
    with gzip.open(f"{path}.gz", "wt") as file:
        file.write(path.read_text())
    recipe = recipe_of(corpus, data__train="[{name: t, source: train.de, target: train.en.gz}]")
    prepare(recipe)
    (copied,) = (corpus / "run" / "fetch" / "text").glob("*/target.txt")
    copied.write_text(copied.read_text().replace("e", "a", 1))
    (corpus / "run" / "clean" / "report.json").unlink()
    with pytest.raises(DataError, match=r"target.txt is not as it was made; remove it"):
        prepare(recipe)
    copied.unlink()
    prepare(recipe)
    vocabulary.write_bytes(b"mine")
    with pytest.raises(DataError, match=r"spm.model is not as it was written: .* Move it away"):
        prepare(recipe)
    assert vocabulary.read_bytes() == b"mine"


def test_gz_files_and_odd_line_separators(corpus: Path) -> None:
    for language, text in (("de", "Ein\u2028Satz.\r\nZwei\u0085Sätze.\n"), ("en", "A\nB\n")):
        with gzip.open(corpus / "data" / f"train.{language}.gz", "wt", newline="") as file:
            file.write(text + "".join(f"Zeile {language} {i}\n" for i in range(300)))
    train = "[{name: gz, source: train.de.gz, target: train.en.gz}]"
    manifest = prepare(recipe_of(corpus, data__train=train))
    assert manifest.totals["train"].pairs == 302


def test_cleaning_counts_what_it_drops(corpus: Path) -> None:
    bad = [
        ("", "Empty."),
        ("\u200b ", "Invisible."),
        ("Das ist der Satz 1.", "This is sentence 1."),  # a duplicate
        ("Das  ist der\tSatz 1.", "This is sentence\u00a01."),  # the same but for white space
        ("Gleich 7", "Gleich 7"),
        ("Guten Abend, Anna.", "Good evening!"),  # source of the test set
        ("Zu lang " * 200, "Too long " * 200),
        ("Kurz.", "A translation that says far more than its source does" + " and on" * 5),
    ]
    write_corpus(corpus / "data", "train", [*GOOD, *bad])
    recipe = recipe_of(corpus)
    assert prepare(recipe).totals["train"].pairs == len(GOOD)
    assert report_of(recipe) == {
        "empty_side": 2,
        "length": 1,
        "length_ratio": 1,
        "identical_sides": 1,
        "test_overlap": 1,
        "duplicates": 2,
    }


def test_validation_pairs_that_are_in_the_test_set_are_warned_of(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = [("Nein.", "No."), ("Guten  Abend, Anna.", "Good evening, Anna.")]
    write_corpus(corpus / "data", "valid", pairs)
    prepare(recipe_of(corpus))
    assert "clean: 1 of 2 pairs of valid are also in test, and so help to choose" in caplog.text


def test_repeats_over_all_corpora(corpus: Path) -> None:
    """The first of equal pairs stays, and of a side's many translations the first `max`."""
    repeated = [("Ja doch.", f"Yes {i}.") for i in range(5)]
    write_corpus(corpus / "data", "more", [*GOOD[:10], *repeated, *GOOD[:3]])
    train = (
        "[{name: train, source: train.de, target: train.en},"
        " {name: more, source: more.de, target: more.en}]"
    )
    filters = "[{filter: duplicates}, {filter: repeated_side, max: 3}]"
    recipe = recipe_of(
        corpus, data__train=train, data__cleaning__filters=filters, data__pairs_per_piece="150"
    )
    prepare(recipe)
    report = json.loads((recipe.run_dir / "clean" / "report.json").read_text())
    assert report["corpora"][0]["dropped"] == {"duplicates": 0, "repeated_side": 0}
    duplicates, side = report["corpora"][1]["filters"]
    assert (duplicates["dropped"], duplicates["seen"], duplicates["share"]) == (13, 18, 0.722222)
    assert duplicates["examples"] == [list(pair) for pair in GOOD[:5]]
    assert (side["dropped"], side["seen"], side["kept"]) == (2, 5, 3)
    assert side["examples"] == [["Ja doch.", "Yes 3."], ["Ja doch.", "Yes 4."]]
    assert (recipe.run_dir / "clean" / "report.png").read_bytes().startswith(b"\x89PNG")
    texts = sorted((recipe.run_dir / "clean" / "train").glob("*/text.en"))
    lines = [line for text in texts for line in text.read_text().split("\n")[:-1]]
    assert lines == [*(pair[1] for pair in GOOD), "Yes 0.", "Yes 1.", "Yes 2."]


@pytest.mark.slow
def test_weights_say_how_often_an_epoch_has_a_corpus(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_corpus(corpus / "data", "more", [(f"Mehr davon, {i}.", f"More, {i}.") for i in range(90)])

    def prepared(weight: str, more: str) -> tuple[Counter[str], tuple[CorpusInfo, ...]]:
        train = (
            f"[{{name: train, source: train.de, target: train.en, weight: {weight}}},"
            f" {{name: more, source: more.de, target: more.en, weight: {more}}}]"
        )
        recipe = recipe_of(corpus, data__train=train, data__pairs_per_piece="150")
        manifest = prepare(recipe)
        reader = ShardReader(recipe.run_dir / "shards", "train", verify=True)
        decode = load_vocabulary(recipe.run_dir / "shards" / "spm.model").decode
        targets = Counter(decode(reader[i][1].tolist()) for i in range(len(reader)))
        return targets, manifest.corpora

    once, _ = prepared("1", "1")
    assert set(once.values()) == {1}
    caplog.set_level("INFO")
    mixed, corpora = prepared("2.5", "0.5")
    assert "clean: up to date, reused" in caplog.text
    assert "shards: done again: weights changed" in caplog.text
    assert "shards: training pairs by weight: 1000 of train (× 2.5), 45 of more (× 0.5)" in (
        caplog.text
    )
    first = Counter(count for text, count in mixed.items() if text.startswith("This"))
    assert first == {2: 200, 3: 200}
    second = Counter(count for text, count in mixed.items() if text.startswith("More"))
    assert second == {1: 45}
    assert [(c.weight, c.kept, c.pairs) for c in corpora] == [
        (2.5, 400, 1000),
        (0.5, 90, 45),
    ]
    again, _ = prepared("1", "1")
    assert prepared("2.5", "0.5")[0] == mixed
    assert again == once


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "data.train=[{name: a, source: train.de, target: train.en, weight: 0}]",
            "data.train.0.weight",
        ),
        (
            "data.train=[{name: a, source: train.de, target: train.en, weight: 1e-9}]",
            "the weights of data.train leave out the rest",
        ),
        ("data.valid.weight=2", "data.valid.weight"),
    ],
)
def test_weights_that_cannot_be(
    corpus: Path, command: Command, override: str, expected: str
) -> None:
    key, value = override.split("=")
    done = command("pipeline.prepare", "--config", corpus / "recipe.yaml", f"--{key}", value)
    assert done.returncode in (1, 2)
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_pairs_over_the_token_limit(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = "Das ist der Satz. " * 20, "This is a sentence."
    write_corpus(corpus / "data", "train", [*GOOD, long])
    write_corpus(corpus / "data", "valid", [GOOD[0], long])
    recipe = recipe_of(
        corpus, data__max_tokens_per_side="40", data__cleaning__filters="[{filter: empty_side}]"
    )
    caplog.set_level("INFO")
    manifest = prepare(recipe)
    assert manifest.totals["train"].pairs == len(GOOD)
    assert "shards: dropped 1 training pairs over the token limit" in caplog.text
    assert "shards: cut 1 valid pairs at the token limit" in caplog.text
    assert "test pairs at the token limit" not in caplog.text
    source, _ = ShardReader(recipe.run_dir / "shards", "valid")[1]
    assert len(source) == 40
    assert source[-1] == EOS_IDX


def test_vocabularies_of_their_own(corpus: Path) -> None:
    recipe = recipe_of(
        corpus,
        data__vocabulary__joint="false",
        data__vocabulary__size="40",
        data__vocabulary__user_defined_symbols="[<2en>]",
        model__tied_embeddings="false",
    )
    manifest = prepare(recipe)
    shards = corpus / "run" / "shards"
    assert {p.name for p in shards.glob("spm*")} == {"spm.source.model", "spm.target.model"}
    assert manifest.vocabulary.sizes == (40, 40)
    source, target = load_vocabularies(shards)
    assert source.encode("<2en>", out_type=str)[-1] == "<2en>"
    reader = ShardReader(shards, "train", verify=True)
    decoded = {
        (source.decode(s.tolist()), target.decode(t.tolist()))
        for s, t in (reader[index] for index in range(len(reader)))
    }
    assert decoded == set(GOOD)


def test_a_sample_is_enough_for_the_vocabulary(corpus: Path) -> None:
    """The same seed draws the same lines; another one draws others."""
    digests = [
        prepare(
            recipe_of(
                corpus,
                run_dir=f"{corpus}/{number}",
                data__seed=seed,
                data__vocabulary__sample_lines="100",
            )
        ).vocabulary.sha256
        for number, seed in enumerate(["1", "1", "2"])
    ]
    assert digests[0] == digests[1] != digests[2]


# ── Bad input: one clear message, exit code 1, nothing half-written ─────────────────────────────


def damage_missing(folder: Path) -> None:
    (folder / "data" / "train.en").unlink()


def damage_length(folder: Path) -> None:
    with (folder / "data" / "train.en").open("a") as file:
        file.write("One more.\n")


def damage_gz(folder: Path) -> None:
    for language in ("de", "en"):
        plain = folder / "data" / f"train.{language}"
        content = gzip.compress(plain.read_bytes())
        plain.with_suffix(f".{language}.gz").write_bytes(content[: len(content) // 2])
    text = (folder / "recipe.yaml").read_text()
    text = text.replace("train.de,", "train.de.gz,").replace("train.en}", "train.en.gz}")
    (folder / "recipe.yaml").write_text(text)


def damage_encoding(folder: Path) -> None:
    lines = (folder / "data" / "train.de").read_bytes().split(b"\n")
    lines[41] = "Käse".encode("latin-1")
    (folder / "data" / "train.de").write_bytes(b"\n".join(lines))


def damage_empty(folder: Path) -> None:
    write_corpus(folder / "data", "train", [("", "")] * 50)


def damage_vocabulary(folder: Path) -> None:
    text = (folder / "recipe.yaml").read_text().replace("size: 60", "size: 30000")
    (folder / "recipe.yaml").write_text(text)


def damage_run_dir(folder: Path) -> None:
    (folder / "run").write_text("a file is in the way")


def damage_empty_files(folder: Path) -> None:
    write_corpus(folder / "data", "train", [])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (damage_missing, ["not found", "data/train.en", "--data.root"]),
        (damage_length, ["train.de ends after 400 lines", "train.en goes on"]),
        (damage_gz, ["train.de.gz: damaged or truncated after line"]),
        (damage_encoding, ["train.de:42: not valid UTF-8 (byte 2"]),
        (damage_empty_files, ["No training pair is left", "train: kept 0 of 0 pairs"]),
        (damage_empty, ["No training pair is left", "50 empty_side"]),
        (damage_vocabulary, ["data.vocabulary.size 30000", "800 lines"]),
        (damage_run_dir, ["/run: there can be no such folder", "File exists"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_input(
    corpus: Path, command: Command, damage: Callable[[Path], None], expected: list[str]
) -> None:
    damage(corpus)
    done = command("pipeline.prepare", "--config", corpus / "recipe.yaml")
    assert done.returncode == 1, done.stderr
    message = done.stderr[done.stderr.index("error:") :]
    for part in expected:
        assert part in message
    assert "Traceback" not in done.stderr
    if (corpus / "run").is_dir():
        assert not (corpus / "run" / "shards").exists()


def test_a_failed_stage_leaves_the_earlier_result(corpus: Path, command: Command) -> None:
    prepare(recipe_of(corpus))
    text = corpus / "run" / "clean" / "train" / "00000" / "text.de"
    before = sha256_of(text)
    damage_encoding(corpus)
    assert command("pipeline.prepare", "--config", corpus / "recipe.yaml").returncode == 1
    assert sha256_of(text) == before


def test_run_dir_that_is_not_writable(corpus: Path, command: Command) -> None:
    run_dir = "/sys/ringformer"  # nobody may write there, root neither
    done = command("pipeline.prepare", "--config", corpus / "recipe.yaml", "--run_dir", run_dir)
    assert done.returncode == 1
    assert "not permitted" in done.stderr or "Permission denied" in done.stderr
    assert run_dir in done.stderr


def test_debug_shows_the_traceback(corpus: Path, command: Command) -> None:
    damage_missing(corpus)
    done = command("pipeline.prepare", "--config", corpus / "recipe.yaml", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
