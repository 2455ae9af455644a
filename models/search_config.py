"""These keys of a recipe's section `evaluation` decide on translations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field as Limit
from pydantic import PositiveInt, ValidationError, model_validator
from typing_extensions import Self

from data_prep.section import Section, fault_of


class SearchConfig(Section):
    """How a model translates: beam search, or sampling."""

    beam_size: PositiveInt = 4
    """Hypotheses kept at each step; 1 is greedy search."""

    length_penalty: float = Limit(default=1.0, ge=-10, le=10)
    """Scores are divided by length to this power."""

    no_repeat_ngram_size: int = Limit(default=0, ge=0)
    """No n-gram of that many tokens occurs twice in a translation; 0 allows it."""

    max_length_ratio: float = Limit(default=1.5, gt=0, le=1000)
    """Longest translation in tokens: this × source tokens + max_length_offset."""

    max_length_offset: int = Limit(default=20, ge=0)
    """See max_length_ratio."""

    sampling_topk: int | None = Limit(default=None, ge=0)
    """Draw each token of a translation from so many of the likeliest ones, 0: from all, instead of
    searching; beam_size is then how many translations of a sentence are drawn. null: search."""

    sampling_temperature: float = Limit(default=1.0, gt=0)
    """Log-probabilities are divided by it before a token is drawn: below 1 likely tokens become
    more likely, above 1 less."""

    sampling_seed: int = Limit(default=1, ge=0)
    """Seed of what is drawn, with the number of the line, the translation of it, and the step."""

    batch_tokens: PositiveInt = 4096
    """Source tokens decoded together, padding included, times beam_size."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the model while it translates; bfloat16 is faster where the processor has it."""

    shortlist: bool | None = None
    """Let translations have those target tokens only that are likely, given the sentence's own:
    of an export that holds such a shortlist, which `export` makes for 16,000 target tokens or more.
    null: in format onnx. true: in format ctranslate2 too, which then translates sentences one by
    one, soon for a single one, slowly for many."""

    @model_validator(mode="after")
    def _samples_if_it_says_how(self) -> Self:
        if self.sampling_topk is None and (self.sampling_temperature, self.sampling_seed) != (1, 1):
            raise ValueError(
                "sampling_temperature and sampling_seed are for sampling: set sampling_topk, too"
            )
        return self

    def replaced(self, keys: Mapping[str, object]) -> SearchConfig:
        """Return the search with other values of some keys.

        :raises TypeError: there is no such key.
        :raises ValueError: a key cannot have this value.
        """
        if unknown := keys.keys() - SearchConfig.model_fields.keys():
            raise TypeError(f"no such search option: {', '.join(sorted(unknown))}")
        own = self.model_dump()
        if "sampling_topk" in keys and keys["sampling_topk"] is None:  # how it would draw goes, too
            own = {key: value for key, value in own.items() if not key.startswith("sampling_")}
        try:
            return SearchConfig.model_validate({**own, **keys}, strict=True)
        except ValidationError as error:
            raise ValueError(fault_of(error)) from error
