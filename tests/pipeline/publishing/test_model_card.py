"""The model card, as model hubs and as MLflow's registry show it."""

from __future__ import annotations

import json
import shutil

import pytest
from ruamel.yaml import YAML

from data_prep.config import TrainingCorpus
from data_prep.files import digest_of
from models.factory import create_model
from pipeline.checkpoints.folder import list_checkpoints
from pipeline.evaluation.result import DIGEST, digest_of_weights
from pipeline.publishing.model_card import as_text, model_card
from pipeline.translation_recipe import TranslationRecipe
from tests.pipeline.conftest import save_checkpoint

SCORES = {
    "sentences": 20, "length_ratio": 1.0, "beam_size": 2, "length_penalty": 1.0,
    **{f"{name}{part}": 1.0 for name in ("bleu", "chrf", "ter") for part in ("", "_ci")},
    **{f"{name}_signature": "nrefs:1" for name in ("bleu", "chrf", "ter")},
    "test_set_sha256": "0", "fingerprint": "0", "files": {},
}  # fmt: skip


@pytest.fixture
def evaluated(
    prepared: TranslationRecipe, tmp_path_factory: pytest.TempPathFactory
) -> TranslationRecipe:
    """A run whose model was evaluated on two test sets, and on a third that the recipe names no
    more."""
    run_dir = tmp_path_factory.mktemp("card") / "run"
    run_dir.mkdir()
    (run_dir / "shards").symlink_to(prepared.shards.absolute())
    others = [{"name": "other", "source": "other.de", "references": ["other.en"]}]
    evaluation = type(prepared.evaluation).model_validate(
        {**prepared.evaluation.model_dump(), "test_sets": others}
    )
    recipe = prepared.model_copy(update={"run_dir": run_dir, "evaluation": evaluation})
    save_checkpoint(create_model(recipe.model, (300, 300), 0), recipe)
    checkpoints = list_checkpoints(recipe.checkpoints)
    for name in ("toy-test", "other", "former"):
        folder = run_dir / "evaluation" / name
        folder.mkdir(parents=True)
        scores = {
            **SCORES,
            "test_set": name,
            "weights_sha256": digest_of_weights(recipe, checkpoints),
            "search": recipe.evaluation.search_of_checkpoints,
            **({"comet": 0.8} if name == "other" else {}),
        }
        content = {**scores, DIGEST: digest_of(json.loads(json.dumps(scores)))}
        (folder / "scores.json").write_text(json.dumps(content))
    return recipe


@pytest.fixture
def card(evaluated: TranslationRecipe) -> str:
    return model_card(evaluated, list_checkpoints(evaluated.checkpoints))


def test_scores_of_a_test_set_that_has_changed_are_not_told(
    evaluated: TranslationRecipe, prepared: TranslationRecipe
) -> None:
    evaluated.clean_text.symlink_to(prepared.clean_text.absolute())
    card = model_card(evaluated, list_checkpoints(evaluated.checkpoints))
    assert "| other | 20 |" in card
    assert "| toy-test | 20 |" not in card


def test_scores_of_an_edited_test_set_are_not_told(
    evaluated: TranslationRecipe, prepared: TranslationRecipe
) -> None:
    shutil.copytree(prepared.clean_text, evaluated.clean_text)
    path = evaluated.clean_text / "test.en"
    path.write_bytes(path.read_bytes()[::-1])
    assert "| toy-test | 20 |" not in model_card(evaluated, list_checkpoints(evaluated.checkpoints))


def test_scores_of_other_search_options_are_not_told(evaluated: TranslationRecipe) -> None:
    keys = evaluated.evaluation.model_copy(update={"length_penalty": -8.0})
    other = evaluated.model_copy(update={"evaluation": keys})
    assert "Not evaluated yet" in model_card(other, list_checkpoints(evaluated.checkpoints))


def test_scores_that_some_test_sets_have_are_told(card: str) -> None:
    assert "| TER | COMET | length ratio |" in card
    assert "| 1.0 ± 1.0 | – | 1.0 | 2 | not known |\n" in card
    assert "| 1.0 ± 1.0 | 0.8 | 1.0 | 2 | not known |\n" in card


def test_what_a_model_was_made_from_is_told(evaluated: TranslationRecipe) -> None:
    (checkpoint,) = list_checkpoints(evaluated.checkpoints)
    said = json.loads((checkpoint.folder / "checkpoint.json").read_text())
    said["training"] |= {"init_from": "models/general", "freeze": ["decoder"]}
    (checkpoint.folder / "checkpoint.json").write_text(json.dumps(said))
    taught = {
        "name": "news", "source": "news.de",
        "translate_with": {"model": ["models/one", "models/two"]},
    }  # fmt: skip
    corpora = (*evaluated.data.train, TrainingCorpus.model_validate(taught))
    data = evaluated.data.model_copy(update={"train": corpora})
    card = model_card(
        evaluated.model_copy(update={"data": data}), list_checkpoints(evaluated.checkpoints)
    )
    assert "| begun from | the weights of `general`, whose card" in card
    assert "| not trained | decoder |" in card
    assert " A model has made the targets of news (by `one` and `two`)." in card


def test_the_header_is_plain_yaml(card: str) -> None:
    _, header, _ = card.split("---\n", 2)
    assert "&" not in header
    assert "*" not in header
    results = YAML(typ="safe").load(header)["model-index"][0]["results"]
    assert [result["dataset"]["name"] for result in results] == ["toy-test", "other"]
    assert results[0]["task"] == results[1]["task"]


def test_the_registry_shows_the_card_as_text(card: str) -> None:
    text = as_text(card)
    assert text.startswith("run: ringformer, de → en\n\n## Model\n")
    assert "\n| | |\n|---|---|\n| architecture&emsp; | ringformer |\n" in text
    assert card.endswith("# " + text.replace("&emsp;", ""))
    assert as_text("A line.\n---\nAnother.\n") == "A line.\n---\nAnother.\n"
