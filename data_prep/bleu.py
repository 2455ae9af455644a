"""sacreBLEU's BLEU, by what is a word in a language."""

# sacrebleu is imported by functions: a command that scores nothing need not wait for it.

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU

# Written without spaces, and sacreBLEU has no tokeniser for them.
UNSPACED = {"th", "tha", "lo", "lao", "my", "mya", "km", "khm", "bo", "bod", "dz", "dzo"}


def sacrebleu_language(code: str) -> str:
    """Return what sacreBLEU calls a language: it chooses a tokeniser by a bare code of two letters.

    :param code: with or without a script or region; of two or three letters.
    """
    language = re.split("[-_]", code)[0]
    return {"zho": "zh", "cmn": "zh", "yue": "zh", "jpn": "ja", "kor": "ko"}.get(language, language)


def bleu_metric(code: str, **options: Any) -> BLEU:
    """Return sacreBLEU's BLEU for a language: by its tokeniser for that, and by characters where it
    has none and words are not set apart. It would take whole sentences for words.

    :param code: as of `sacrebleu_language`.
    :raises RuntimeError: sacreBLEU's tokeniser needs packages that are not there.
    """
    from sacrebleu import BLEU

    language = sacrebleu_language(code)
    if language in UNSPACED:
        options["tokenize"] = "char"
    return BLEU(trg_lang=language, **options)
