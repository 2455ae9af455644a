"""`transformers` itself opens an export, and computes and translates as we do."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.text import BOS_IDX, EOS_IDX, PAD_IDX
from models.config import ModelConfig
from models.export_format import ModelError
from models.factory import create_model
from models.marian import marian_config, marian_weights
from pipeline.publishing.exports import export
from pipeline.translation.batches import collate_ids
from pipeline.translation.serving import Part
from pipeline.translation.translator import load_exports
from pipeline.translation_recipe import TranslationRecipe
from tests.pipeline.conftest import exported

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: it must ask nobody

from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    MarianConfig,
    MarianMTModel,
    pipeline,
)


@pytest.mark.parametrize(
    "keys",
    [
        {"level_signals": "all"},
        {"level_signals": "static", "tied_embeddings": False, "scale_embeddings": False},
        {"architecture": "transformer"},
        {"encoder_levels": 4, "decoder_levels": 2, "residual_scale": 1.5},
    ],
)
def test_logits_are_ours(keys: dict[str, Any]) -> None:
    sizes = {"model_dim": 32, "num_heads": 4, "ffn_inner_dim": 64, "num_levels": 3}
    config = ModelConfig.model_validate({**sizes, "max_seq_len": 60, **keys})
    torch.manual_seed(1)
    model = create_model(config, (300, 300 if config.tied_embeddings else 250), PAD_IDX).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    lengths = range(1, 60)
    source, target = ([torch.randint(4, 250, (n,)).tolist() for n in lengths] for _ in "st")
    batch = collate_ids(source, target[::-1], torch.device("cpu"))
    theirs, found = MarianMTModel.from_pretrained(
        None,
        config=MarianConfig(**marian_config(model)),  # type: ignore[no-untyped-call]
        state_dict=marian_weights(model),
        output_loading_info=True,
    )
    assert not any(found.values()), found
    with torch.inference_mode():
        expected = model.logits(batch.source_seqs, batch.target_seqs)
        found = theirs.eval()(
            input_ids=batch.source_seqs,
            attention_mask=(batch.source_seqs != PAD_IDX).long(),
            decoder_input_ids=batch.target_seqs,
        ).logits
    real = batch.targets != PAD_IDX
    logits = found[real][:, : expected.size(2)]
    torch.testing.assert_close(logits, expected[real], atol=1e-4, rtol=0)
    assert (found[real][:, expected.size(2) :] == -torch.inf).all()


@pytest.mark.slow
def test_a_thousand_real_sentences(
    talkative_run: TranslationRecipe, tmp_path: Path, shared: Path
) -> None:
    # Random weights go round in circles, up to the longest translation; so they must not.
    keys: dict[str, Any] = {
        "no_repeat_ngram_size": 2,
        "length_penalty": 2.0,
        "max_length_ratio": 1.0,
    }
    evaluation = talkative_run.evaluation.model_copy(update=keys)
    export(talkative_run.model_copy(update={"evaluation": evaluation}), tmp_path, "huggingface")
    ours = load_exports(exported(talkative_run, "safetensors"), **keys)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)  # type: ignore[no-untyped-call]
    model, loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, MarianMTModel)
    assert not any(loaded.values()), loaded

    path = shared / "data" / "multi30k" / "train.de.gz"
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")[:4000]
    tokens = ours.source_vocabulary.encode(lines, add_eos=True)
    both = sorted(zip(tokens, lines, strict=True), key=lambda both: len(both[0]))[:1000]
    expected, translated = [], []
    for begin in range(0, 1000, 250):
        sources, texts = map(list, zip(*both[begin : begin + 250], strict=True))
        (hypotheses,) = ours.search_batches([list(map(Part, sources))])
        expected += [[BOS_IDX, *own[0].tokens] for own in hypotheses]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        lengths = batch.attention_mask.sum(1).tolist()
        ids = [row[:n] for row, n in zip(batch.input_ids.tolist(), lengths, strict=True)]
        assert ids == sources
        found = model.generate(**batch)
        assert isinstance(found, torch.Tensor)
        translated += [row[: row.index(EOS_IDX) + 1] for row in found.tolist()]
    assert len(expected) == 1000
    assert len(set(map(tuple, expected))) > 150
    # Of random weights some are nearly ties, which rounding decides.
    assert sum(found != own for found, own in zip(translated, expected, strict=True)) <= 2

    texts = [*lines[:3], "</s> <unk>"]
    answers = pipeline("translation", model=str(tmp_path))(texts)
    assert [each["translation_text"] for each in answers] == ours.translate(texts)


def test_it_is_not_for_us(talkative_run: TranslationRecipe) -> None:
    with pytest.raises(ModelError, match="its format is huggingface, which the library transf"):
        load_exports(exported(talkative_run, "huggingface"))
