"""Decoding speed at base size with random weights, beside fairseq2's and Hugging Face's generate,
and on a CPU CTranslate2's of the same RingFormer, exported (with --text).

Sentences have lengths as in newswire (5 to 80 tokens, 25 on average), or are those of a file. Every
system translates each to exactly its source's length (EOS is impossible before and forced then), so
only speed differs. CTranslate2 has one length for a batch: its batches are of equal lengths.

python -m benchmarks.decode [--sentences 1 128] [--beams 1 4] [--rounds 5] [--dtype bfloat16]
    [--text FILE --vocabulary SPM_MODEL] [--only NAME...]
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import ctranslate2
import numpy as np
import torch
from fairseq2.data.tokenizers import VocabularyInfo
from fairseq2.generation.beam_search import BeamSearchSeq2SeqGenerator
from fairseq2.nn import BatchLayout
from sentencepiece import SentencePieceProcessor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, LogitsProcessorList, MarianConfig, MarianMTModel

from benchmarks.rounds import add_device, dtype_of, measure, options, ratios, table
from data_prep.corpora import read_lines
from data_prep.vocabulary import BOS_IDX, EOS_IDX, PAD_IDX
from models.config import Architecture, ModelConfig
from models.ctranslate2_spec import ctranslate2_spec
from models.factory import create_model
from models.seq2seq import TranslationModel
from pipeline.recipe import EvaluationConfig
from pipeline.translation.beam_search import beam_search
from pipeline.translation.serving import batches_by_length

VOCAB = 32000
OURS = "RingFormer, our search"
NAIVE, NAIVE_SENTENCES = "RingFormer, no cache (8 sentences)", 8


def model_of(architecture: Architecture, dim: int) -> TranslationModel:
    config = ModelConfig(
        architecture=architecture, model_dim=dim, num_heads=dim // 64, ffn_inner_dim=4 * dim,
        tied_embeddings=False,
    )  # fmt: skip
    model = create_model(config, (VOCAB, VOCAB), PAD_IDX).eval()
    assert model.final_proj.bias is not None
    with torch.no_grad():
        model.final_proj.bias[EOS_IDX] = -1e4
    return model


def marian(dim: int) -> Any:
    """The plain Transformer of equal width and depth in Hugging Face's implementation."""
    config = MarianConfig(  # type: ignore[no-untyped-call]
        vocab_size=VOCAB, d_model=dim, encoder_layers=6, decoder_layers=6,
        encoder_attention_heads=dim // 64, decoder_attention_heads=dim // 64,
        encoder_ffn_dim=4 * dim, decoder_ffn_dim=4 * dim,
        max_position_embeddings=512, pad_token_id=PAD_IDX,
        eos_token_id=EOS_IDX, decoder_start_token_id=BOS_IDX, forced_eos_token_id=None,
        activation_function="gelu",
    )  # fmt: skip
    model: Any = MarianMTModel(config)
    model.eval()
    model.final_logits_bias[0, EOS_IDX] = -1e4
    return model


class EndAtSourceLength(LogitsProcessor):
    """Forces EOS on the rows of a sentence when its translation is as long as its source."""

    def __init__(self, lengths: torch.Tensor, beam_size: int) -> None:
        self.lengths = lengths.repeat_interleave(beam_size)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ending = self.lengths <= input_ids.size(1)
        scores[ending] = -torch.inf
        scores[ending, EOS_IDX] = 0
        return scores


def generate(peer: Any, sentences: list[list[int]], beam_size: int, size: int = 64) -> None:
    """Hugging Face's generate on batches of `size` sentences in the order given."""
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


def ours(model: TranslationModel, sentences: list[list[int]], search: EvaluationConfig) -> None:
    lengths = {index: len(ids) for index, ids in enumerate(sentences)}
    for batch in batches_by_length(lengths, search):
        found = beam_search(model, [sentences[index] for index in batch], search)
        assert all(len(best[0].tokens) == lengths[i] for i, best in zip(batch, found, strict=True))


def fairseq2s(
    model: TranslationModel, sentences: list[list[int]], search: EvaluationConfig
) -> None:
    """fairseq2's generator on our batches; its longest output is that of the longest source."""
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


def exported(model: TranslationModel, quantization: str | None, workers: int) -> Any:
    """:returns: a CTranslate2 model whose tokens are the numbers of ours."""
    spec = ctranslate2_spec(model)
    tokens = ["<pad>", "<unk>", "<s>", "</s>", *map(str, range(4, VOCAB))]
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    spec.validate()
    spec.optimize(quantization)
    threads = torch.get_num_threads()
    with TemporaryDirectory() as folder:
        spec.save(folder)
        return ctranslate2.Translator(
            folder, inter_threads=workers, intra_threads=max(1, threads // workers)
        )


def ctranslate2s(peer: Any, sentences: list[list[int]], search: EvaluationConfig) -> None:
    """All batches are under way at once; a worker takes the next when it is done with one."""
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


def naive(model: TranslationModel, sentences: list[list[int]]) -> None:
    """Argmax without a cache: every step computes the whole prefix again."""
    source = padded(sentences, next(model.parameters()).device)
    output = source.new_full((len(sentences), 1), BOS_IDX)
    with torch.inference_mode():
        for _ in range(source.size(1)):
            last = model.logits(source, output)[:, -1]
            output = torch.cat([output, last.argmax(1, keepdim=True)], dim=1)


def padded(sentences: list[list[int]], device: torch.device) -> torch.Tensor:
    tensors = [torch.tensor(ids) for ids in sentences]
    return pad_sequence(tensors, batch_first=True, padding_value=PAD_IDX).to(device)


def newswire(count: int) -> list[list[int]]:
    """Random sentences; lengths log-normal."""
    generator = np.random.default_rng(0)
    lengths = np.exp(generator.normal(3.1, 0.5, count)).clip(5, 80).astype(int)
    if count == 1:
        lengths[0] = 25
    return [generator.integers(4, VOCAB, length).tolist() for length in lengths]


def real(text: Path, vocabulary: Path, count: int) -> list[list[int]]:
    """Sentences of 5, 15, 25, … tokens, spread evenly over a file: so few lengths that batches of
    equal length are as full as the whole file would make them."""
    encode = SentencePieceProcessor(model_file=str(vocabulary)).encode
    ids = encode([*read_lines(text)], add_eos=True)
    found: list[list[int]] = [tokens for tokens in ids if len(tokens) % 10 == 5]
    return found[:: max(1, len(found) // count)][:count]


def compare(
    seconds: Mapping[str, Mapping[str, Sequence[float]]], tokens: Mapping[str, float], caption: str
) -> None:
    """A table of systems and settings.

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
    table(caption, ["time over RingFormer, our search", *seconds], rows)


def main() -> None:
    parser = options(__doc__)
    add_device(parser)
    parser.add_argument("--sentences", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--model_dim", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--text", type=Path, help="file to take the sentences from")
    parser.add_argument("--vocabulary", type=Path, help="SentencePiece model for it")
    parser.add_argument("--only", nargs="+", default=[""], help="systems whose names begin so")
    arguments = parser.parse_args()
    if (arguments.text is None) != (arguments.vocabulary is None):
        parser.error("--text and --vocabulary go together")
    device, dim = arguments.device, arguments.model_dim
    dtype, threads = dtype_of(arguments.dtype), torch.get_num_threads()
    torch.manual_seed(0)
    ring = model_of("ringformer", dim).to(device, dtype)
    plain = model_of("transformer", dim).to(device, dtype)
    peer = marian(dim).to(device, dtype)
    exports = {
        f"RingFormer, CTranslate2 {name or 'float32'}, workers × threads: {workers} × "
        f"{max(1, threads // workers)}": exported(ring, name, workers)
        for name in (None, "int8")
        for workers in sorted({1, threads})
        if arguments.text and device.type == "cpu" and dtype == torch.float32
    }
    found: dict[str, dict[str, list[float]]] = {}
    tokens: dict[str, float] = {}
    for count in arguments.sentences:
        sentences = newswire(count)
        if arguments.text:
            sentences = real(arguments.text, arguments.vocabulary, count)
        by_length = sorted(sentences, key=len)
        for beam in arguments.beams:
            search = EvaluationConfig(beam_size=beam, max_length_ratio=1.0, max_length_offset=0)
            runs: dict[str, Callable[[], None]] = {
                OURS: partial(ours, ring, sentences, search),
                "RingFormer, fairseq2's generator": partial(fairseq2s, ring, sentences, search),
                "Transformer, our search": partial(ours, plain, sentences, search),
                "Transformer, Hugging Face": partial(generate, peer, sentences, beam),
            }
            if count > 1:
                runs["Transformer, Hugging Face, sorted by length"] = partial(
                    generate, peer, by_length, beam
                )
            if beam == 1:
                runs[NAIVE] = partial(naive, ring, sentences[:NAIVE_SENTENCES])
            for name, model in exports.items():
                runs[name] = partial(ctranslate2s, model, sentences, search)
            begins = (OURS, *arguments.only)
            runs = {name: run for name, run in runs.items() if name.startswith(begins)}
            setting = f"{len(sentences):,} sentence{'s' * (count > 1)}, beam {beam}"
            seconds = measure(runs, arguments.rounds, device)
            tokens[setting] = sum(map(len, sentences))
            if NAIVE in seconds:
                scale = tokens[setting] / sum(map(len, sentences[:NAIVE_SENTENCES]))
                seconds[NAIVE] = [scale * time for time in seconds[NAIVE]]
            found[setting] = seconds
    where = arguments.text.name if arguments.text else "random, lengths of newswire"
    compare(
        found, tokens, f"Width {dim}, vocabulary {VOCAB:,}, {arguments.dtype}; sentences: {where}"
    )


if __name__ == "__main__":
    main()
