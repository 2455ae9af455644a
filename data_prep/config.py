"""The `data` section of a recipe."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import Field as Limit
from pydantic import PositiveInt, field_validator, model_validator

from data_prep.bleu import bleu_metric, sacrebleu_language
from data_prep.filters import (
    DEFAULT_FILTERS,
    SYNTHETIC_FILTERS,
    Filter,
    Filters,
    OverAllCorpora,
    TestOverlap,
)
from data_prep.section import Section
from data_prep.text import normalise

LanguageCode = Annotated[str, Limit(pattern="^[a-z]{2,3}([-_][A-Za-z0-9]+)*$")]


class Corpus(Section):
    """A pair of line-aligned files."""

    name: str
    """What reports call it."""

    source: str
    """Source side, below `data.root`: plain text, `.gz` or `.sgm`, one sentence a line."""

    target: str
    """Target side, likewise."""

    @property
    def files(self) -> dict[str, str]:
        """Return its files, by side."""
        return {"source": self.source, "target": self.target}


class TranslateWith(Section):
    """The model that makes a side of a corpus, and how it translates: where a key is null, as the
    model was exported."""

    model: Path | tuple[Path, ...]
    """Folder written by `./run.sh export`, in any format but huggingface; several of format
    safetensors are an ensemble. Without `target` it goes from source to target language, without
    `source` from target to source language."""

    beam_size: PositiveInt | None = None
    """As evaluation.beam_size; null where tokens are drawn for a corpus of one side: 1."""

    length_penalty: float | None = None
    """As evaluation.length_penalty."""

    no_repeat_ngram_size: int | None = Limit(default=None, ge=0)
    """As evaluation.no_repeat_ngram_size."""

    sampling_topk: int | None = Limit(default=None, ge=0)
    """As evaluation.sampling_topk: draw tokens from so many, 0: from all."""

    sampling_temperature: float | None = Limit(default=None, gt=0)
    """As evaluation.sampling_temperature."""

    sampling_seed: int | None = Limit(default=None, ge=0)
    """As evaluation.sampling_seed."""

    batch_tokens: PositiveInt | None = None
    """As evaluation.batch_tokens."""

    lines_per_piece: PositiveInt = 4000
    """Lines that a worker translates at once: what a killed command can lose of its work. In the
    place of data.pairs_per_piece."""

    min_score: float | None = None
    """Drop translations with a lower score: log-probability ÷ length to the power of the length
    penalty."""

    filters: Filters = SYNTHETIC_FILTERS
    """Filters on this corpus, as data.cleaning.filters; applied first, and in the place of those of
    the same name there."""

    @field_validator("model", mode="before")
    @classmethod
    def _names_a_model(cls, value: object) -> object:
        models = value if isinstance(value, list | tuple) else [value]
        if not models or not all(isinstance(model, str | Path) for model in models):
            raise ValueError(f"expected the folder of an export, or a list of some, not {value!r}")
        return value

    @field_validator("filters")
    @classmethod
    def _looks_at_one_pair(cls, filters: tuple[Filter, ...]) -> tuple[Filter, ...]:
        for each in filters:
            if isinstance(each, (*OverAllCorpora, TestOverlap)):
                raise ValueError(
                    f"{each.filter} looks at all corpora: data.cleaning.filters has it"
                )
        return filters

    @property
    def models(self) -> tuple[Path, ...]:
        return self.model if isinstance(self.model, tuple) else (self.model,)


class TrainingCorpus(Section):
    """A pair of line-aligned files to train on, or one file and a model that translates it."""

    name: str
    """What reports call it."""

    source: str | None = None
    """Source side, below `data.root`: plain text, `.gz` or `.sgm`, one sentence a line. Required,
    unless translate_with makes it."""

    target: str | None = None
    """Target side, likewise. With both sides and translate_with, the target becomes the
    translation that is nearest to it, of those that the model finds."""

    weight: float = Limit(default=1, gt=0)
    """How often an epoch has each of its pairs: 3 is three times, 0.5 a half of them, drawn at
    random in data preparation."""

    tag: str | None = None
    """Put before each of its sources once they are cleaned, such as `<BT>`: one of
    data.vocabulary.user_defined_symbols."""

    translate_with: TranslateWith | None = None
    """A model makes the side that has no file, or the target of a pair."""

    @property
    def files(self) -> dict[str, str]:
        """Return its files, by side."""
        files = {"source": self.source, "target": self.target}
        return {side: path for side, path in files.items() if path is not None}

    @property
    def made_side(self) -> str:
        """Return which side `translate_with` makes."""
        return "source" if self.source is None else "target"

    @model_validator(mode="after")
    def _has_its_sides(self) -> TrainingCorpus:
        missing = {"source", "target"} - self.files.keys()
        if self.translate_with is None and missing:
            raise ValueError(f"{min(missing)} is required, or translate_with, which makes it")
        if len(missing) == 2:
            raise ValueError("source or target is required: what the model translates")
        if self.tag is not None and normalise(self.tag) != self.tag:
            raise ValueError(f"tag {self.tag!r} must be text without spaces around it, on one line")
        if self.translate_with and not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(
                f"name {self.name!r} must be fit for a folder: letters, digits, `_`, `.`, `-`"
            )
        return self


class Download(Section):
    """Where to get files that are not below `data.root` yet."""

    url: str
    """http(s) address of the file or archive."""

    bytes: PositiveInt
    """Its size."""

    sha256: str = Limit(pattern="^[0-9a-f]{64}$")
    """Its checksum."""

    folder: str = ""
    """Folder below `data.root` that receives the file, or the members of the archive."""

    members: tuple[str, ...] = ()
    """Files to unpack from a tar archive, and folders with all that is in them; none means that the
    file itself is wanted."""

    @field_validator("url")
    @classmethod
    def _ends_in_a_name(cls, url: str) -> str:
        if not re.match("https?://.", url):
            raise ValueError("expected http://… or https://…")
        if url.rsplit("/", 1)[-1] in ("", ".", ".."):
            raise ValueError("expected an address that ends in the name of a file")
        return url

    @field_validator("folder", "members")
    @classmethod
    def _stays_below_root(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for name in (value,) if isinstance(value, str) else value:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\0" in name:
                raise ValueError(f"expected a path below data.root, not {name!r}")
        if isinstance(value, str):
            return value
        if any(not PurePosixPath(name).name for name in value):
            raise ValueError("expected the names of files")
        return tuple(str(PurePosixPath(name)) for name in value)

    @property
    def provides(self) -> tuple[str, ...]:
        """Return the paths below `data.root` that exist after this download."""
        names = self.members or (self.url.rsplit("/", 1)[-1],)
        return tuple(str(Path(self.folder) / name) for name in names)


class ToyCorpusConfig(Section):
    """Sizes of the embedded German–English corpus, in sentence pairs."""

    train: PositiveInt = 24000
    """Pairs in toy/train.{de,en}."""

    valid: PositiveInt = 500
    """Pairs in toy/valid.{de,en}."""

    test: PositiveInt = 500
    """Pairs in toy/test.{de,en}."""


class CleaningConfig(Section):
    """What is dropped from the training corpora."""

    filters: Filters = DEFAULT_FILTERS
    """Filters in the order in which they are applied, each `{filter: NAME, SETTING: VALUE}`:
    empty_side, length, length_ratio, identical_sides, letters, digits, repeated_characters,
    repetition, script, language, test_overlap, duplicates, repeated_side (data_prep/filters.py has
    their settings). duplicates and repeated_side look at all corpora together and come last."""

    @model_validator(mode="after")
    def _in_an_order_that_works(self) -> CleaningConfig:
        global_ones = [isinstance(each, OverAllCorpora) for each in self.filters]
        if global_ones != sorted(global_ones):
            raise ValueError("filters: duplicates and repeated_side must come after all others")
        return self


OF_TAKEN_VOCABULARIES = {"joint", "user_defined_symbols"}  # keys that can be beside `from`


class VocabularyConfig(Section):
    """SentencePiece."""

    taken_from: Path | tuple[Path, Path] | None = Limit(default=None, alias="from")
    """Take a vocabulary, and train none: that of an export or of a run, by its folder, or a
    SentencePiece model, by its file; where joint is false, two files may be named, `[SOURCE,
    TARGET]`. Beside it there are joint and user_defined_symbols only: what the vocabulary must be
    and have."""

    type: Literal["bpe", "unigram"] = "bpe"
    """SentencePiece model type."""

    size: PositiveInt = 32000
    """Number of tokens, special ones included."""

    joint: bool = True
    """One vocabulary for both languages; false trains one for each side (then model.tied_embeddings
    must be false)."""

    normalization: Literal["identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"] = "identity"
    """What SentencePiece makes of text before it cuts it, by its own names. `identity` keeps every
    character; after `nfkc` a model writes `...`, `TM` and `1⁄2` where a reference has `…`, `™` and
    `½`; `nmt_nfkc` is SentencePiece's own default; with `_cf` text loses its capitals."""

    character_coverage: float = Limit(default=1.0, gt=0.9, le=1)
    """Share of characters that get a token; lower it for Chinese or Japanese."""

    byte_fallback: bool = False
    """Spell unknown characters in bytes instead of `<unk>`."""

    user_defined_symbols: tuple[str, ...] = ()
    """Symbols that are always one token, such as `<2de>`."""

    sample_lines: PositiveInt = 1_000_000
    """Train on at most that many lines, drawn with the recipe's seed; memory grows with them."""

    @field_validator("taken_from", mode="before")
    @classmethod
    def _is_a_path_or_two(cls, value: object) -> object:
        paths = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
        if value is not None and not all(isinstance(path, str | Path) for path in paths):
            raise ValueError(f"expected a path, or a list of two, not {value!r}")
        return value

    @property
    def unused(self) -> set[str]:
        """Return the keys that say how to train a vocabulary, where one is taken."""
        used = {"taken_from", *OF_TAKEN_VOCABULARIES}
        return set(type(self).model_fields) - used if self.taken_from is not None else set()

    @model_validator(mode="after")
    def _is_trained_or_taken(self) -> VocabularyConfig:
        if self.taken_from is None:
            return self
        if beside := sorted(self.model_fields_set & self.unused):
            raise ValueError(
                f"{beside[0]} says how to train a vocabulary, and `from` takes one; remove one of "
                "the two"
            )
        if isinstance(self.taken_from, tuple) and self.joint:
            raise ValueError("`from` names a file for each side, and so joint must be false")
        return self


class Preparation(Section):
    """Where data come from and who prepares them: the keys that the data of every task have."""

    root: Path = Path("data")
    """Where files are looked for before anything is downloaded, and where downloads go."""

    downloads: tuple[Download, ...] = ()
    """Where missing files come from."""

    executor: Literal["processes", "dask"] = "processes"
    """Who does the work: processes of this machine, or the workers of a Dask scheduler (in
    `.venv`, else the extra `cluster`; they must see the same paths). The result is the same."""

    workers: PositiveInt | None = None
    """Processes; null: one per core."""

    scheduler: str | None = None
    """Address of the Dask scheduler, tcp://HOST:PORT."""

    seed: int = Limit(default=1, ge=0)
    """Seed of everything random in data preparation."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the files and folders below `root` that data are prepared from."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _scheduler_for_dask(self) -> Preparation:
        if (self.executor == "dask") != (self.scheduler is not None):
            raise ValueError("executor dask and scheduler go together: set both or none")
        return self


class DataConfig(Preparation):
    """Corpora and how they become shards."""

    source_lang: LanguageCode = "de"
    """Source language: two or three letters, with a script or a region if you like: zh, zh-TW,
    deu_Latn."""

    target_lang: LanguageCode = "en"
    """Target language, likewise."""

    train: tuple[TrainingCorpus, ...] = Limit(min_length=1)
    """Training corpora."""

    valid: Corpus
    """Validation set."""

    test: Corpus
    """Test set; its name appears in the scores."""

    toy_corpus: ToyCorpusConfig | None = None
    """When set, toy/{train,valid,test}.{de,en} are generated by our own grammar."""

    cleaning: CleaningConfig = CleaningConfig()
    """Filters on training pairs."""

    vocabulary: VocabularyConfig = VocabularyConfig()
    """The subword vocabulary."""

    max_tokens_per_side: PositiveInt = 256
    """Drop a training pair with more tokens on a side (EOS included)."""

    pairs_per_shard: PositiveInt = 250_000
    """Sentence pairs in one shard file, about."""

    pairs_per_piece: PositiveInt = 50_000
    """Lines of a corpus that a worker takes at once: what a killed command can lose of its work.
    Another value draws another order and another sample for the vocabulary."""

    @property
    def inputs(self) -> tuple[str, ...]:
        corpora: tuple[Corpus | TrainingCorpus, ...] = (*self.train, self.valid, self.test)
        return tuple(sorted({path for each in corpora for path in each.files.values()}))

    @property
    def languages(self) -> tuple[str, str]:
        return self.source_lang, self.target_lang

    def filters_of(self, corpus: TrainingCorpus) -> tuple[Filter, ...]:
        """Return the filters of a training corpus, in the order in which they are applied."""
        own = corpus.translate_with.filters if corpus.translate_with else ()
        names = {each.filter for each in own}
        return (*own, *(each for each in self.cleaning.filters if each.filter not in names))

    @model_validator(mode="after")
    def _names_differ(self) -> DataConfig:
        if len({corpus.name for corpus in self.train}) < len(self.train):
            raise ValueError("train: every corpus needs a name of its own")
        if self.source_lang == self.target_lang:
            raise ValueError("source_lang and target_lang must differ")
        _check_that_bleu_knows(self.target_lang)
        symbols = self.vocabulary.user_defined_symbols
        for corpus in self.train:
            if corpus.tag is not None and corpus.tag not in symbols:
                raise ValueError(
                    f"train: {corpus.name}: tag {corpus.tag} must be one of "
                    "vocabulary.user_defined_symbols"
                )
        return self


def _check_that_bleu_knows(target_lang: str) -> None:
    """Check now what would end an evaluation after days of training.

    :raises ValueError: sacreBLEU splits this language into words by packages that are not there.
    """
    language = sacrebleu_language(target_lang)
    if language not in ("ja", "ko"):  # sacreBLEU splits all others itself
        return
    try:
        bleu_metric(target_lang)
    except RuntimeError as error:
        raise ValueError(
            f"target_lang: sacreBLEU needs more packages to score {target_lang}; "
            f".venv/bin/python -m pip install 'sacrebleu[{language}]' brings them"
        ) from error
