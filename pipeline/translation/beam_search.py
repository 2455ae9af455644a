"""Beam search, sampling (`search.py`) and forced decoding with PyTorch models.

Keys and values are not copied for each hypothesis (`models/ringformer/decoder_state.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from fairseq2.nn import IncrementalStateBag
from torch import Tensor

from data_prep.text import EOS_IDX
from models.padding import PaddedLayout, to_device
from models.recording import record
from models.search_config import SearchConfig
from models.seq2seq import TranslationModel
from models.stack import Stack
from pipeline.translation.batches import collate_ids
from pipeline.translation.decode import decode_batch
from pipeline.translation.search import Decoding, Floats, Ints, NextTokens, pad
from pipeline.translation.serving import Hypothesis, PairIds, Part


@torch.inference_mode()
def beam_search(
    models: Sequence[TranslationModel], parts: Sequence[Part], search: SearchConfig
) -> list[list[Hypothesis]]:
    """Translate sentences in one batch; or draw translations, if `search` says so.

    :param models: one, or an ensemble: the mean of their log-probabilities counts.
    :param parts: the sentences; see `decode_batch`.
    :returns: at most `beam_size` hypotheses for each sentence, best first, or as they were drawn.
    :raises ModelError: the models' output is not a number.
    """
    decoding = TorchDecoding(models, [part.source for part in parts])
    return decode_batch(decoding, parts, search, decoding.max_seq_len)


@torch.inference_mode()
def force(models: Sequence[TranslationModel], pairs: PairIds) -> list[list[float]]:
    """Return the log-probabilities of the tokens of given translations, computed at once.

    :param models: one, or an ensemble.
    """
    batch = collate_ids(*pairs, next(models[0].parameters()).device)
    log_probs = _mean([model.log_probs(*batch) for model in models]).tolist()
    return [row[: len(ids)] for row, ids in zip(log_probs, pairs[1], strict=True)]


@torch.inference_mode()
def cross_attention(models: Sequence[TranslationModel], pairs: PairIds) -> Floats:
    """Return where models look in the sources when they predict each token of given translations.

    It is that of the decoder's level N // 2 + 1, which found most of the words that we know, the
    mean over its heads, and over the models of an ensemble.

    :returns: `[B, T, S]`; a row that is no padding sums to 1.
    """
    batch = collate_ids(*pairs, next(models[0].parameters()).device)
    of_models = []
    for model in models:
        decode = partial(model.log_probs, *batch)
        of_levels = record({"decoder": model.decoder}, decode)["decoder"].cross_attention
        assert of_levels is not None  # of an encoder
        of_models.append(of_levels[len(of_levels) // 2].float().mean(1))
    found: Floats = _mean(of_models).cpu().numpy()
    return found


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors)).mean(0)


class TorchDecoding(Decoding):
    """PyTorch models decode a batch on their device; a step brings a few numbers to the host."""

    def __init__(
        self, models: Sequence[TranslationModel], sources: Sequence[Sequence[int]]
    ) -> None:
        self.models = models
        self.max_seq_len = min(model.max_target_seq_len for model in models)
        self.device = next(models[0].parameters()).device
        source, lengths = pad(sources)
        self.source = to_device(torch.from_numpy(source), self.device)
        self.layout = PaddedLayout(lengths, source.shape[1], self.device)
        self.state = IncrementalStateBag(self.max_seq_len + 1)  # each module has its own in it
        self.beam_size = 1

    def next_tokens(self, last: Ints, count: int, named: Ints | None = None) -> NextTokens:
        """Decode one position; see `Decoding`."""
        new = torch.from_numpy(last).to(self.device).reshape(-1, 1)
        layout = PaddedLayout(np.ones(last.size, np.int64), 1, self.device)
        outputs = [
            model(self.source, self.layout, new, layout, state_bag=self.state).float()
            for model in self.models
        ]
        self.state.increment_step_nr()
        log_sum = _mean([logits.logsumexp(dim=2) for logits in outputs]).view(*last.shape, 1)
        logits = _mean(outputs).view(*last.shape, -1)
        size = logits.size(2)
        if count < size:
            best, found = logits.topk(count)
            tokens = found.cpu().numpy()
        else:
            best, tokens = logits, np.broadcast_to(np.arange(size), logits.shape)
        if named is None:
            of_named = logits[:, :, EOS_IDX, None]
        else:
            places = torch.from_numpy(named).to(self.device)[:, None]
            of_named = logits.gather(2, places.expand(-1, last.shape[1], -1))
        log_probs = (torch.cat([best, of_named], dim=2) - log_sum).cpu().numpy()
        return NextTokens(tokens, *np.split(log_probs, [tokens.shape[2]], axis=2))

    def reorder(self, sentences: Ints, parents: Ints) -> None:
        """Keep some sentences; see `Decoding`."""
        rows = sentences[:, None] * self.beam_size + parents
        self.beam_size = parents.shape[1]
        order = torch.from_numpy(rows.flatten())
        # A ring's state looks at the order on the host; fairseq2's layers index by it.
        if not all(isinstance(model.decoder, Stack) for model in self.models):
            order = to_device(order, self.device)
        self.state.reorder(order)
