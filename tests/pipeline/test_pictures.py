"""Pictures: the same numbers are drawn as the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.analysis.drawings import draw_attention, draw_cka, draw_cosines
from pipeline.pictures import draw_bleu_by_length, draw_confusion, draw_losses

PNG = b"\x89PNG"


def test_bleu_by_length(tmp_path: Path) -> None:
    buckets = [
        {"source_tokens": "1–10", "sentences": 119, "bleu": 31.4, "bleu_ci": 2.7},
        {"source_tokens": "> 60", "sentences": 1, "bleu": 12.5, "bleu_ci": 0.0},
    ]
    draw_bleu_by_length("title", buckets, tmp_path / "a.png")
    draw_bleu_by_length("title", buckets, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_a_dollar_is_a_dollar(tmp_path: Path) -> None:
    name, path, ones = "a$_$", tmp_path / "picture.png", np.ones((2, 2))
    draw_confusion(name, ones.astype(np.int64), [name, "▁$$"], path)
    draw_attention(name, ones[None], [name, "▁$$"], ["▁$$", name], path)
    draw_cka((name, name), {name: ones}, path)
    draw_cosines({name: {name: ones}}, path)
    assert path.read_bytes().startswith(PNG)


def test_losses(tmp_path: Path) -> None:
    draw_losses({"train_loss": {10: 2.0, 20: 1.5}, "valid_bleu": {20: 3.0}}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    draw_losses({}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
