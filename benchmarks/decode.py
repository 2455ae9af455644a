"""Decoding speed at base size with random weights, beside fairseq2's and Hugging Face's generate.

Every system translates the same sentences to exactly the same length (EOS is made impossible before
it), so that only speed differs.

python -m benchmarks.decode [--batches 1 64] [--beams 1 4] [--length 25] [--rounds 5]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from fairseq2.data.tokenizers import VocabularyInfo
from fairseq2.generation.beam_search import BeamSearchSeq2SeqGenerator
from fairseq2.nn import BatchLayout
from transformers import MarianConfig, MarianMTModel

from benchmarks.rounds import describe, device_of, measure, report
from data_prep.vocabulary import BOS_IDX, EOS_IDX, PAD_IDX
from models.config import Architecture, ModelConfig
from models.factory import create_model
from models.seq2seq import TranslationModel
from pipeline.config import EvaluationConfig
from pipeline.search import beam_search

VOCAB = 32000


def model_of(architecture: Architecture) -> TranslationModel:
    config = ModelConfig(architecture=architecture, tied_embeddings=False)
    model = create_model(config, VOCAB, PAD_IDX).eval()
    assert model.final_proj.bias is not None
    with torch.no_grad():
        model.final_proj.bias[EOS_IDX] = -1e4
    return model


def marian() -> MarianMTModel:
    """The plain Transformer of equal width and depth in Hugging Face's implementation."""
    config = MarianConfig(
        vocab_size=VOCAB, d_model=512, encoder_layers=6, decoder_layers=6,
        encoder_attention_heads=8, decoder_attention_heads=8, encoder_ffn_dim=2048,
        decoder_ffn_dim=2048, max_position_embeddings=512, pad_token_id=PAD_IDX,
        eos_token_id=EOS_IDX, decoder_start_token_id=BOS_IDX, forced_eos_token_id=None,
        activation_function="gelu",
    )  # fmt: skip
    model = MarianMTModel(config).eval()
    model.final_logits_bias[0, EOS_IDX] = -1e4
    return model


def naive(model: TranslationModel, source: torch.Tensor, length: int) -> None:
    """Argmax without a cache: every step computes the whole prefix again."""
    output = torch.full((source.size(0), 1), BOS_IDX, device=source.device)
    with torch.inference_mode():
        for _ in range(length):
            last = model.logits(source, output)[:, -1]
            output = torch.cat([output, last.argmax(1, keepdim=True)], dim=1)


def runs_of(
    models: dict[str, TranslationModel],
    peer: MarianMTModel,
    source: torch.Tensor,
    beam: int,
    length: int,
) -> dict[str, Callable[[], object]]:
    search = EvaluationConfig(beam_size=beam, max_length_ratio=1e-9, max_length_offset=length)
    sentences = source.tolist()
    runs: dict[str, Callable[[], object]] = {
        name: lambda model=model: beam_search(model, sentences, search)  # type: ignore[misc]
        for name, model in models.items()
    }
    ring = models["RingFormer"]
    generate = BeamSearchSeq2SeqGenerator(
        ring,
        VocabularyInfo(VOCAB, None, BOS_IDX, EOS_IDX, PAD_IDX),
        beam_size=beam,
        max_gen_len=length,
    )
    prompt = torch.full((len(sentences), 1), BOS_IDX, device=source.device)
    layouts = BatchLayout.of(source), BatchLayout.of(prompt)
    runs["RingFormer, fairseq2's generator"] = lambda: generate(
        source, layouts[0], prompt, layouts[1]
    )
    runs["Transformer, Hugging Face generate"] = lambda: peer.generate(
        source, num_beams=beam, do_sample=False, max_new_tokens=length, use_cache=True
    )
    if beam == 1:
        runs["RingFormer, no cache"] = lambda: naive(ring, source, length)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--length", type=int, default=25, help="tokens of sources and translations")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", help="cpu or cuda [cuda if there is one]")
    arguments = parser.parse_args()
    device, length = device_of(arguments.device), arguments.length
    torch.manual_seed(0)
    models = {
        "RingFormer": model_of("ringformer").to(device),
        "Transformer": model_of("transformer").to(device),
    }
    peer = marian().to(device)  # type: ignore[arg-type]
    print(f"## {describe(device)}")
    for size in arguments.batches:
        source = torch.randint(4, VOCAB, (size, length), device=device)
        for beam in arguments.beams:
            runs = runs_of(models, peer, source, beam, length)
            seconds = measure(runs, arguments.rounds, device)
            title = f"batch {size}, beam {beam}, {length} tokens"
            report(title, seconds, "RingFormer", size * length, "output tokens")


if __name__ == "__main__":
    main()
