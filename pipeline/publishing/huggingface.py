"""An export that `transformers` opens: `MarianMTModel` and `MarianTokenizer`, and how it searches.

The library itself is not needed to write it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.files import write_atomically
from data_prep.text import BOS_IDX, EOS_IDX, PAD_IDX, UNK_IDX, vocabulary_files
from data_prep.vocabulary import load_vocabularies
from models.export_format import WEIGHTS, ExportSettings
from models.search_config import SearchConfig
from pipeline.translation.serving import length_limit, tokens_of

if TYPE_CHECKING:
    from models.seq2seq import TranslationModel


def write_huggingface(
    model: TranslationModel,
    shards: Path,
    settings: ExportSettings,
    search: SearchConfig,
    folder: Path,
) -> None:
    """Write all but the model card and export.json.

    :param shards: the folder with the SentencePiece models.
    :param folder: to write to.
    """
    from safetensors.torch import save_file

    from models.marian import marian_config, marian_weights

    # In float32 the bytes would depend on the order of additions, which is not ours to choose.
    save_file(marian_weights(model.double()), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # as the other files; it is 0600
    longest = settings.max_source_tokens or model.max_source_seq_len
    limit = length_limit(longest, search, model.max_target_seq_len)
    contents: dict[str, Any] = {
        "config.json": marian_config(model),
        "generation_config.json": _generation_config(search, limit),
        "tokenizer_config.json": _tokenizer_config(shards, settings, longest),
    }
    files, vocabularies = vocabulary_files(shards), load_vocabularies(shards)
    names = ("vocab.json", "target_vocab.json")[: len(files)]
    for name, vocabulary in zip(names, vocabularies, strict=False):
        contents[name] = {token: index for index, token in enumerate(tokens_of(vocabulary))}
    for name, content in contents.items():  # in ASCII: the library reads them in any locale
        write_atomically(folder / name, json.dumps(content, indent=2) + "\n")
    shutil.copyfile(files[0], folder / "source.spm")
    shutil.copyfile(files[-1], folder / "target.spm")


def _generation_config(search: SearchConfig, limit: int) -> dict[str, Any]:
    """Return how the library searches as `pipeline/translation/search.py` does.

    :param limit: of a translation in tokens, EOS included; there it is one for all sentences.
    """
    found: dict[str, Any] = {
        "decoder_start_token_id": BOS_IDX,
        "bos_token_id": BOS_IDX,
        "eos_token_id": EOS_IDX,
        "pad_token_id": PAD_IDX,
        "forced_eos_token_id": EOS_IDX,
        "suppress_tokens": [PAD_IDX, BOS_IDX],
        "max_length": limit + 1,  # with BOS
        "num_beams": search.beam_size,
        "no_repeat_ngram_size": search.no_repeat_ngram_size,
    }
    if search.sampling_topk is not None:
        drawn = {"do_sample": True, "top_k": search.sampling_topk}
        return {**found, "num_beams": 1, **drawn, "temperature": search.sampling_temperature}
    if search.beam_size > 1:  # or the library would warn
        found |= {"early_stopping": True, "length_penalty": search.length_penalty}
    return found


def _tokenizer_config(shards: Path, settings: ExportSettings, longest: int) -> dict[str, Any]:
    tokens = tokens_of(load_vocabularies(shards)[0])
    return {
        "tokenizer_class": "MarianTokenizer",
        "source_lang": settings.source_lang,
        "target_lang": settings.target_lang,
        "separate_vocabs": len(vocabulary_files(shards)) > 1,
        "model_max_length": longest,
        "pad_token": tokens[PAD_IDX],
        "unk_token": tokens[UNK_IDX],
        "bos_token": tokens[BOS_IDX],
        "eos_token": tokens[EOS_IDX],
        "split_special_tokens": True,  # in a text, these are characters like any others
        "clean_up_tokenization_spaces": False,
    }
