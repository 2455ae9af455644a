"""Measure how fast models of base size with random weights decode.

Our search runs beside fairseq2's generator and Hugging Face's generate; on a CPU also beside
CTranslate2 with an export of the same RingFormer (with --text). Sentences are random, with lengths
as in newswire (5 to 80 tokens, 25 on average), or those of a file. Every system translates each to
exactly its source's length (EOS is impossible before and forced then), so that only speed differs.
CTranslate2 has one length for a whole batch, so its batches are of sentences of equal length.

python -m benchmarks.decode [--sentences 1 128] [--beams 1 4] [--rounds 5] [--dtype bfloat16]
    [--text FILE --vocabulary SPM_MODEL] [--only NAME...]
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import ctranslate2
import torch
from fairseq2.data.tokenizers import VocabularyInfo
from fairseq2.generation.beam_search import BeamSearchSeq2SeqGenerator
from fairseq2.nn import BatchLayout
from sentencepiece import SentencePieceProcessor
from transformers import LogitsProcessor, LogitsProcessorList, MarianConfig, MarianMTModel

from benchmarks.our_search import (
    VOCAB,
    model_of,
    random_sentences,
    run_our_search,
    search_to_source_length,
)
from benchmarks.rounds import (
    add_device_options,
    create_parser,
    dtype_of,
    measure,
    print_table,
    ratios,
)
from data_prep.corpora import read_lines
from data_prep.text import BOS_IDX, EOS_IDX, PAD_IDX
from models.config import ModelConfig
from models.ctranslate2_spec import ctranslate2_spec
from models.export_format import SHORTLISTS
from models.seq2seq import TranslationModel
from pipeline.translation.search import pad
from pipeline.translation.serving import batches_by_length
from pipeline.translation_recipe import TranslationEvaluation

Run = Callable[[], None]

OURS = "RingFormer, our search"
NAIVE, NAIVE_SENTENCES = "RingFormer, no cache (8 sentences)", 8


def marian(config: ModelConfig, vocab_size: int) -> Any:
    """Return Hugging Face's implementation of the Transformer of equal width and depth."""
    theirs = MarianConfig(  # type: ignore[no-untyped-call]
        vocab_size=vocab_size, d_model=config.model_dim,
        encoder_layers=config.encoder_levels, decoder_layers=config.decoder_levels,
        encoder_attention_heads=config.num_heads, decoder_attention_heads=config.num_heads,
        encoder_ffn_dim=config.ffn_inner_dim, decoder_ffn_dim=config.ffn_inner_dim,
        max_position_embeddings=config.max_seq_len, pad_token_id=PAD_IDX, eos_token_id=EOS_IDX,
        decoder_start_token_id=BOS_IDX, forced_eos_token_id=None, activation_function="gelu",
    )  # fmt: skip
    model: Any = MarianMTModel(theirs)
    return model.eval()


class EndAtSourceLength(LogitsProcessor):
    """Forces EOS on the rows of a sentence when its translation is as long as its source."""

    def __init__(self, lengths: torch.Tensor, beam_size: int) -> None:
        self.lengths = lengths.repeat_interleave(beam_size)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ending = self.lengths <= input_ids.size(1)
        scores[ending] = -torch.inf
        scores[ending, EOS_IDX] = 0
        return scores


def run_hugging_face(peer: Any, sentences: list[list[int]], beam_size: int, size: int = 64) -> None:
    """Run Hugging Face's generate on batches of `size` sentences, in the order given."""
    for begin in range(0, len(sentences), size):
        part = sentences[begin : begin + size]
        lengths = torch.tensor([len(ids) for ids in part], device=peer.device)
        source = padded(part, peer.device)
        peer.generate(
            source,
            attention_mask=(source != PAD_IDX).long(),
            num_beams=beam_size,
            do_sample=False,
            max_new_tokens=int(lengths.max()),
            logits_processor=LogitsProcessorList([EndAtSourceLength(lengths, beam_size)]),
        )


def run_fairseq2(
    model: TranslationModel, sentences: list[list[int]], search: TranslationEvaluation
) -> None:
    """Run fairseq2's generator on our batches; each decodes up to the length of its longest."""
    generator = BeamSearchSeq2SeqGenerator(
        model,
        VocabularyInfo(VOCAB, None, BOS_IDX, EOS_IDX, PAD_IDX),
        beam_size=search.beam_size,
        max_gen_len=(1, 0),
    )
    lengths = {index: len(ids) for index, ids in enumerate(sentences)}
    for batch in batches_by_length(lengths, search):
        source = padded([sentences[index] for index in batch], next(model.parameters()).device)
        prompt = source.new_full((len(batch), 1), BOS_IDX)
        generator(source, model.layout(source), prompt, BatchLayout.of(prompt))


def export_to_ctranslate2(
    model: TranslationModel, quantization: str | None, workers: int, shortlist: int = 0
) -> Any:
    """Return the CTranslate2 export of `model`; its tokens are our token ids as text.

    :param shortlist: how many tokens a shortlist allows, the same for every sentence; 0: none.
    """
    threads = torch.get_num_threads()
    with TemporaryDirectory() as folder:
        write_ctranslate2(model, Path(folder), quantization, VOCAB, shortlist)
        return ctranslate2.Translator(
            folder, inter_threads=workers, intra_threads=max(1, threads // workers)
        )


def write_ctranslate2(
    model: TranslationModel, folder: Path, quantization: str | None, vocab_size: int, shortlist: int
) -> None:
    """Write the CTranslate2 export of `model`; its tokens are our token ids as text.

    :param shortlist: how many tokens a shortlist allows, the same for every sentence; 0: none.
    """
    spec = ctranslate2_spec(model)
    tokens = ["<pad>", "<unk>", "<s>", "</s>", *map(str, range(4, vocab_size))]
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    spec.validate()
    spec.optimize(quantization)
    spec.save(str(folder))
    if shortlist:
        line = "\t" + " ".join(tokens[EOS_IDX : EOS_IDX + shortlist])
        (folder / SHORTLISTS["ctranslate2"]).write_text(line + "\n")


def run_ctranslate2(peer: Any, sentences: list[list[int]], search: TranslationEvaluation) -> None:
    """Hand all batches to CTranslate2's workers at once, and check the lengths."""
    by_length = defaultdict(list)
    for ids in sentences:
        by_length[len(ids)].append([*map(str, ids[:-1])])  # and EOS, which it adds
    futures = []
    for length in sorted(by_length, reverse=True):
        group = by_length[length]
        size = max(1, search.batch_tokens // (length * search.beam_size))
        for begin in range(0, len(group), size):
            batch = group[begin : begin + size]
            futures += peer.translate_batch(
                batch, asynchronous=True, beam_size=search.beam_size, max_input_length=0,
                min_decoding_length=length, max_decoding_length=length,
            )  # fmt: skip
    lengths = sorted(len(future.result().hypotheses[0]) for future in futures)
    assert lengths == sorted(map(len, sentences))


def run_without_cache(model: TranslationModel, sentences: list[list[int]]) -> None:
    """Decode greedily without a cache: every step computes the whole prefix again."""
    source = padded(sentences, next(model.parameters()).device)
    output = source.new_full((len(sentences), 1), BOS_IDX)
    with torch.inference_mode():
        for _ in range(source.size(1)):
            last = model.logits(source, output)[:, -1]
            output = torch.cat([output, last.argmax(1, keepdim=True)], dim=1)


def padded(sentences: list[list[int]], device: torch.device) -> torch.Tensor:
    """Return token ids as a tensor `[B, S]`, padded on the right."""
    return torch.from_numpy(pad(sentences)[0]).to(device)


def sentences_of_file(text: Path, vocabulary: Path, count: int) -> list[list[int]]:
    """Return the token ids of `count` sentences of 5, 15, 25, … tokens, spread evenly over a file.

    There are so few lengths that batches of equal length are as full as with the whole file.
    """
    encode = SentencePieceProcessor(model_file=str(vocabulary)).encode
    ids = encode([*read_lines(text)], add_eos=True)
    found: list[list[int]] = [tokens for tokens in ids if len(tokens) % 10 == 5]
    return found[:: max(1, len(found) // count)][:count]


def print_comparison(
    seconds: Mapping[str, Mapping[str, Sequence[float]]], tokens: Mapping[str, float], caption: str
) -> None:
    """Print a table of systems and settings.

    :param seconds: by setting and system, round 0 included.
    :param tokens: output tokens of a run in each setting.
    """
    names = max(seconds.values(), key=len)
    rows = []
    for name in names:
        row = [name]
        for setting, of_setting in seconds.items():
            reference, times = of_setting[OURS][1:], of_setting.get(name, [])[1:]
            if name == OURS:
                row.append(f"1 = {tokens[setting] / median(times):,.0f} output tokens/s")
            else:
                row.append(ratios(times, reference) if times else "")
        rows.append(row)
    print_table(caption, ["time over RingFormer, our search", *seconds], rows)


class Models(NamedTuple):
    """Models of the same width and depth with random weights."""

    ring: TranslationModel
    transformer: TranslationModel
    marian: Any
    exports: dict[str, Any]
    """CTranslate2 models of the RingFormer, by the titles of their rows."""


def create_models(arguments: argparse.Namespace) -> Models:
    """Return all models, on the device and in the precision of the command line."""
    device, dim = arguments.device, arguments.model_dim
    dtype, threads = dtype_of(arguments.dtype), torch.get_num_threads()
    torch.manual_seed(0)
    ring = model_of("ringformer", dim).to(device, dtype)
    transformer = model_of("transformer", dim).to(device, dtype)
    exports = {
        f"RingFormer, CTranslate2 {name or 'float32'}, workers × threads: {workers} × "
        f"{max(1, threads // workers)}": export_to_ctranslate2(ring, name, workers)
        for name in (None, "int8")
        for workers in sorted({1, threads})
        if arguments.text and device.type == "cpu" and dtype == torch.float32
    }
    theirs = marian(ring.config, VOCAB)
    theirs.final_logits_bias[0, EOS_IDX] = -1e4  # as ours
    return Models(ring, transformer, theirs.to(device, dtype), exports)


def runs_of(models: Models, sentences: list[list[int]], beam_size: int) -> dict[str, Run]:
    """Return for each system a function that translates `sentences`."""
    search = search_to_source_length(beam_size)
    runs: dict[str, Run] = {
        OURS: partial(run_our_search, models.ring, sentences, search),
        "RingFormer, fairseq2's generator": partial(run_fairseq2, models.ring, sentences, search),
        "Transformer, our search": partial(run_our_search, models.transformer, sentences, search),
        "Transformer, Hugging Face": partial(run_hugging_face, models.marian, sentences, beam_size),
    }
    if len(sentences) > 1:
        runs["Transformer, Hugging Face, sorted by length"] = partial(
            run_hugging_face, models.marian, sorted(sentences, key=len), beam_size
        )
    if beam_size == 1:
        runs[NAIVE] = partial(run_without_cache, models.ring, sentences[:NAIVE_SENTENCES])
    for name, model in models.exports.items():
        runs[name] = partial(run_ctranslate2, model, sentences, search)
    return runs


def main() -> None:
    """Time all systems in each setting, and print a table."""
    parser = create_parser(__doc__)
    add_device_options(parser)
    parser.add_argument("--sentences", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--model_dim", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--text", type=Path, help="file to take the sentences from")
    parser.add_argument("--vocabulary", type=Path, help="SentencePiece model for it")
    parser.add_argument("--only", nargs="+", default=[""], help="systems whose names begin so")
    arguments = parser.parse_args()
    if (arguments.text is None) != (arguments.vocabulary is None):
        parser.error("--text and --vocabulary go together")
    models = create_models(arguments)
    begins = (OURS, *arguments.only)
    found: dict[str, dict[str, list[float]]] = {}
    tokens: dict[str, float] = {}
    for count in arguments.sentences:
        sentences = random_sentences(count)
        if arguments.text:
            sentences = sentences_of_file(arguments.text, arguments.vocabulary, count)
        for beam in arguments.beams:
            runs = runs_of(models, sentences, beam)
            runs = {name: run for name, run in runs.items() if name.startswith(begins)}
            setting = f"{len(sentences):,} sentence{'s' * (count > 1)}, beam {beam}"
            seconds = measure(runs, arguments.rounds, arguments.device)
            tokens[setting] = sum(map(len, sentences))
            if NAIVE in seconds:
                scale = tokens[setting] / sum(map(len, sentences[:NAIVE_SENTENCES]))
                seconds[NAIVE] = [scale * time for time in seconds[NAIVE]]
            found[setting] = seconds
    where = arguments.text.name if arguments.text else "random, lengths of newswire"
    size = f"Width {arguments.model_dim}, vocabulary {VOCAB:,}, {arguments.dtype}"
    print_comparison(found, tokens, f"{size}; sentences: {where}")


if __name__ == "__main__":
    main()
