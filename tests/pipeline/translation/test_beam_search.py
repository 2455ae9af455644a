"""Beam search finds what fairseq2's generator finds, and keeps what its options promise."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from fairseq2.data.tokenizers import VocabularyInfo
from fairseq2.generation.beam_search import BeamSearchSeq2SeqGenerator
from fairseq2.nn import BatchLayout

from data_prep.text import BOS_IDX, EOS_IDX, PAD_IDX
from models.config import Architecture, ModelConfig
from models.export_format import ModelError
from models.factory import create_model
from models.seq2seq import TranslationModel
from pipeline.translation_recipe import TranslationEvaluation
from tests.pipeline.translation.searches import translate

VOCAB = 30
SOURCES = [[5, 9, 7, 3], [11, 3], [8, 8, 21, 14, 6, 29, 10, 3], [4, 3], [17, 12, 13, 3]]


def model_of(architecture: Architecture = "ringformer", seed: int = 0) -> TranslationModel:
    """Return a model of random weights, sharp enough that there are no ties, and prone to end."""
    torch.manual_seed(seed)
    config = ModelConfig(
        architecture=architecture, model_dim=32, num_heads=2, ffn_inner_dim=64, num_levels=3,
        dropout=0.0, tied_embeddings=False, max_seq_len=40,
    )  # fmt: skip
    model = create_model(config, (VOCAB, VOCAB), PAD_IDX).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3) if "signal" in name else parameter.mul_(2)
    set_bias(model, EOS_IDX, 5)
    return model


def set_bias(model: TranslationModel, token: int, value: float) -> None:
    """Make a token more or less likely."""
    assert model.final_proj.bias is not None
    with torch.no_grad():
        model.final_proj.bias[token] = value


def fairseq2_search(
    model: TranslationModel, source: list[int], search: TranslationEvaluation
) -> list[tuple[list[int], float]]:
    """Return all hypotheses of fairseq2's own generator, for one sentence."""
    generator = BeamSearchSeq2SeqGenerator(
        model,
        VocabularyInfo(VOCAB, None, BOS_IDX, EOS_IDX, PAD_IDX),
        beam_size=search.beam_size,
        max_gen_len=(search.max_length_ratio, search.max_length_offset),
        len_penalty=search.length_penalty,
    )
    source_seqs, prompt = torch.tensor([source]), torch.tensor([[BOS_IDX]])
    output = generator(source_seqs, BatchLayout.of(source_seqs), prompt, BatchLayout.of(prompt))
    return [(h.seq.tolist(), float(h.score or 0)) for h in output.hypotheses[0]]


@pytest.mark.parametrize("beam_size", [1, 4, 5])
@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_all_hypotheses_equal_fairseq2s(architecture: Architecture, beam_size: int) -> None:
    search = TranslationEvaluation(beam_size=beam_size, length_penalty=0.8)
    lengths = set()
    for inclination_to_end in (3, 6):
        model = model_of(architecture)
        set_bias(model, EOS_IDX, inclination_to_end)
        set_bias(model, BOS_IDX, -100)  # which fairseq2 does not forbid
        found = translate(model, SOURCES, search)
        for source, hypotheses in zip(SOURCES, found, strict=True):
            expected = fairseq2_search(model, source, search)
            assert [h.tokens for h in hypotheses] == [tokens for tokens, _ in expected]
            scores = [score for _, score in expected]
            assert [h.score for h in hypotheses] == pytest.approx(scores, abs=1e-4)
        lengths |= {len(h.tokens) for hypotheses in found for h in hypotheses}
    assert len(lengths) > 3 or beam_size == 1  # sentences left the batch one after the other


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_a_score_is_what_the_model_gives_the_whole_translation(architecture: Architecture) -> None:
    """The model reads it in one pass without a cache, however often hypotheses changed places."""
    model = model_of(architecture)
    set_bias(model, EOS_IDX, 3)
    search = TranslationEvaluation(beam_size=4, length_penalty=0.8)
    for source, hypotheses in zip(SOURCES, translate(model, SOURCES, search), strict=True):
        for hypothesis in hypotheses:
            target = torch.tensor([[BOS_IDX, *hypothesis.tokens]])
            with torch.no_grad():
                logits = model.logits(torch.tensor([source]), target[:, :-1])
            tokens = target[:, 1:, None]
            total = float(logits.log_softmax(2).gather(2, tokens).sum())
            expected = total / len(hypothesis.tokens) ** search.length_penalty
            assert hypothesis.score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_the_batch_changes_nothing(architecture: Architecture) -> None:
    model, search = model_of(architecture, seed=1), TranslationEvaluation(beam_size=4)
    together = translate(model, SOURCES, search)
    for source, hypotheses in zip(SOURCES, together, strict=True):
        (alone,) = translate(model, [source], search)
        assert [h.tokens for h in alone] == [h.tokens for h in hypotheses]
        assert [h.score for h in alone] == pytest.approx([h.score for h in hypotheses], abs=1e-4)


def test_length_is_a_function_of_the_own_source() -> None:
    model = model_of()
    set_bias(model, EOS_IDX, -100)  # never ends by itself
    search = TranslationEvaluation(beam_size=2, max_length_ratio=1.0, max_length_offset=2)
    for source, hypotheses in zip(SOURCES, translate(model, SOURCES, search), strict=True):
        assert [len(h.tokens) for h in hypotheses] == [len(source) + 2] * 2
        assert all(h.tokens[-1] == EOS_IDX for h in hypotheses)
    longest = TranslationEvaluation(beam_size=1, max_length_offset=1000)
    ((hypothesis,),) = translate(model, SOURCES[:1], longest)
    assert len(hypothesis.tokens) == 40  # model.max_seq_len


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_occurs_twice(size: int) -> None:
    model = model_of()
    set_bias(model, EOS_IDX, -2)
    free = TranslationEvaluation(beam_size=3)
    held = TranslationEvaluation(beam_size=3, no_repeat_ngram_size=size)

    def repetitions(search: TranslationEvaluation) -> int:
        count = 0
        for hypotheses in translate(model, SOURCES, search):
            for tokens in (h.tokens for h in hypotheses):
                ngrams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
                count += len(ngrams) - len(set(ngrams))
        return count

    assert repetitions(free) > 0
    assert repetitions(held) == 0


def test_a_diverged_model_is_named() -> None:
    model = model_of()
    with torch.no_grad():
        model.final_proj.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="not a number"):
        translate(model, SOURCES, TranslationEvaluation())
