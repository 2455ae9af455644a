"""Ensembles, prefixes and sampling do what a plain implementation of them does."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.text import BOS_IDX, EOS_IDX, PAD_IDX
from models.export_format import Format, ModelError
from models.search_config import SearchConfig
from models.seq2seq import TranslationModel
from pipeline.translation.beam_search import force
from pipeline.translation.serving import length_limit
from pipeline.translation.translator import Translator, load_exports
from pipeline.translation_recipe import TranslationRecipe
from tests.pipeline.conftest import exported
from tests.pipeline.translation.searches import translate
from tests.pipeline.translation.test_beam_search import SOURCES, VOCAB, model_of, set_bias

PREFIXES = [[], [7, 8], [EOS_IDX + 1] * 14, [9], []]  # one is longer than the limit


def log_probs(
    models: Sequence[TranslationModel], source: list[int], target: list[int]
) -> torch.Tensor:
    """Return the mean log-probabilities of what comes after BOS and `target`."""
    ids = torch.tensor([source]), torch.tensor([[BOS_IDX, *target]])
    with torch.no_grad():
        found = [model.logits(*ids)[0, -1].log_softmax(0) for model in models]
    return torch.stack(found).mean(0)


def plain_search(
    models: Sequence[TranslationModel], source: list[int], search: SearchConfig, prefix: list[int]
) -> list[tuple[list[int], float]]:
    """Search one sentence, a candidate at a time, without a cache."""
    limit = max(length_limit(len(source), search, 40), len(prefix) + 1)
    alive, done = [([0] * 0, 0.0)], list[tuple[list[int], float]]()
    for step in range(1, limit + 1):
        allowed = set(range(VOCAB)) - {PAD_IDX, BOS_IDX}
        if step <= len(prefix):
            allowed = {prefix[step - 1]}
        elif step == limit:
            allowed = {EOS_IDX}
        candidates = [
            ([*ids, token], total + float(values[token]))
            for ids, total in alive
            for values in [log_probs(models, source, ids)]
            for token in allowed
        ]
        candidates = sorted(candidates, key=lambda one: -one[1])[: 2 * search.beam_size]
        done += [one for one in candidates[: search.beam_size] if one[0][-1] == EOS_IDX]
        alive = [one for one in candidates if one[0][-1] != EOS_IDX][: search.beam_size]
        if len(done) >= search.beam_size or not alive:
            break
    scored = [(ids, total / len(ids)) for ids, total in done[: search.beam_size]]
    return sorted(scored, key=lambda one: -one[1])


@pytest.mark.parametrize("count", [1, 2])
def test_ensembles_and_prefixes_equal_a_plain_search(count: int) -> None:
    models = [model_of("transformer"), model_of()][:count]  # of any architectures
    for model in models:
        set_bias(model, EOS_IDX, 3)
    search = SearchConfig(beam_size=3, max_length_offset=2)
    found = translate(models, SOURCES, search, PREFIXES)
    for source, hypotheses, prefix in zip(SOURCES, found, PREFIXES, strict=True):
        expected = plain_search(models, source, search, prefix)
        assert [h.tokens for h in hypotheses] == [ids for ids, _ in expected]
        assert [h.score for h in hypotheses] == pytest.approx([s for _, s in expected], abs=1e-4)
        assert all(h.tokens[: len(prefix)] == prefix for h in hypotheses)
        (values,) = force(models, ([source], [hypotheses[0].tokens]))
        assert np.mean(values) == pytest.approx(hypotheses[0].score, abs=1e-4)


def test_samples_depend_on_seed_and_place_alone() -> None:
    model, keys = model_of(), {"beam_size": 3, "sampling_topk": 5, "sampling_temperature": 2.0}
    search = SearchConfig.model_validate(keys)
    places = [(line, 0) for line in range(len(SOURCES))]
    together = translate(model, SOURCES, search, (), places)
    for source, place, hypotheses in zip(SOURCES, places, together, strict=True):
        (alone,) = translate(model, [source], search, (), [place])
        assert [h.tokens for h in alone] == [h.tokens for h in hypotheses]
        (first,) = translate(
            model, [source], search.model_copy(update={"beam_size": 1}), (), [place]
        )
        assert first[0].tokens == hypotheses[0].tokens
        values = force([model], ([source] * 3, [h.tokens for h in hypotheses]))
        means = [np.mean(row) for row in values]
        assert [h.score for h in hypotheses] == pytest.approx(means, abs=1e-4)
    for other in (
        translate(model, SOURCES, search.model_copy(update={"sampling_seed": 2}), (), places),
        translate(model, SOURCES, search, (), places[::-1]),
    ):
        assert [[h.tokens for h in own] for own in other] != [
            [h.tokens for h in own] for own in together
        ]
    greedy = SearchConfig(beam_size=1, sampling_topk=1)
    searched = translate(model, SOURCES, SearchConfig(beam_size=1), PREFIXES)
    drawn = translate(model, SOURCES, greedy, PREFIXES)
    assert [own[0].tokens for own in drawn] == [own[0].tokens for own in searched]


@pytest.mark.parametrize(("topk", "temperature"), [(0, 1.0), (0, 2.0), (4, 0.5)])
def test_tokens_are_drawn_by_their_probabilities(topk: int, temperature: float) -> None:
    model, count = model_of(), 3000
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.8)  # less sure
    search = SearchConfig(beam_size=count, sampling_topk=topk, sampling_temperature=temperature)
    search = search.model_copy(update={"max_length_ratio": 0.1, "max_length_offset": 2})
    (hypotheses,) = translate(model, SOURCES[:1], search)
    seen = Counter(h.tokens[0] for h in hypotheses)
    values = log_probs([model], SOURCES[0], []) / temperature
    values[[PAD_IDX, BOS_IDX]] = -torch.inf
    if topk:
        values[values < values.topk(topk).values[-1]] = -torch.inf
    expected = values.softmax(0)
    assert set(seen) <= set(expected.nonzero().flatten().tolist())
    deviation = [
        abs(seen[token] - count * p) / (count * p * (1 - p)) ** 0.5
        for token, p in enumerate(expected.tolist())
        if count * p > 10
    ]
    assert max(deviation) < 4
    assert len(deviation) > 3


@pytest.mark.parametrize("format", ["onnx", "ctranslate2"])
def test_exports_take_the_same_options(
    format: Format, talkative_run: TranslationRecipe, sentences: list[str]
) -> None:
    """After a prefix, CTranslate2's beam search is another; greedy search is not."""
    folders = exported(talkative_run, "safetensors"), exported(talkative_run, format)
    beam_size = {"onnx": 4, "ctranslate2": 1}[format]
    ours, theirs = (load_exports(folder, beam_size=beam_size) for folder in folders)
    prefixes = ["The old", "", "The man"] * len(sentences)
    arguments = (sentences, lambda count: None, 1, prefixes[: len(sentences)])
    for own, other, prefix in zip(
        ours.n_best(*arguments), theirs.n_best(*arguments), prefixes, strict=False
    ):
        assert other[0].text == own[0].text
        assert other[0].score == pytest.approx(own[0].score, rel=1e-4, abs=1e-4)
        assert own[0].text.startswith(prefix) or not own[0].text
    keys = {"sampling_topk": 3, "sampling_seed": 7, "beam_size": 1}
    drawn, again, other_seed = (
        load_exports(folders[1], **{**keys, "sampling_seed": seed}).n_best(sentences)
        for seed in (7, 7, 8)
    )
    assert drawn == again
    assert drawn != other_seed
    if format == "onnx":
        expected = load_exports(folders[0], **keys).translate(sentences)
        assert [best[0].text for best in drawn] == expected


def test_what_makes_an_ensemble(
    talkative_run: TranslationRecipe, sentences: list[str], tmp_path: Path
) -> None:
    folder = exported(talkative_run, "safetensors")
    twice = Translator.of_exports([folder, folder])
    assert "an ensemble of 2" in twice.backend
    assert twice.translate(sentences) == load_exports(folder).translate(sentences)
    with pytest.raises(ModelError, match="its format is onnx, and models of an ensemble"):
        Translator.of_exports([folder, exported(talkative_run, "onnx")])
    foreign = tmp_path / "foreign"
    shutil.copytree(folder, foreign)
    with (foreign / "spm.model").open("ab") as file:
        file.write(b"\n")
    with pytest.raises(ModelError, match="foreign has another vocabulary than"):
        Translator.of_exports([folder, foreign])
    back = tmp_path / "back"
    shutil.copytree(folder, back)
    settings = json.loads((back / "export.json").read_text())
    settings |= {"source_lang": "en", "target_lang": "de"}
    (back / "export.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"back goes from en to de, and .* from de to en"):
        Translator.of_exports([folder, back])
    with pytest.raises(ModelError, match=r"line 3: the prefix has .* tokens, and the model can"):
        twice.n_best(["Ja.", "", "Ja."], first_line=1, prefixes=["", "", "The house. " * 40])


def test_what_draws_can_search() -> None:
    drawing = SearchConfig(beam_size=2, sampling_topk=5, sampling_temperature=0.7, sampling_seed=3)
    assert drawing.replaced({"sampling_topk": None}) == SearchConfig(beam_size=2)
    assert drawing.replaced({"sampling_seed": 4}).sampling_temperature == 0.7
    with pytest.raises(ValueError, match="set sampling_topk, too"):
        drawing.replaced({"sampling_topk": None, "sampling_seed": 4})
    with pytest.raises(ValueError, match="`batch_tokens`: Input should be greater than 0"):
        drawing.replaced({"batch_tokens": 0})
    with pytest.raises(TypeError, match="no such search option: beam"):
        drawing.replaced({"beam": 4})
