"""Log where a run comes from: its recipe, data, code and machine."""

# `gpu_names` imports pynvml itself: many commands log nothing, and need not wait for it.

from __future__ import annotations

import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from pydantic.main import IncEx

from data_prep.files import digest_of
from data_prep.stage import Manifest
from pipeline.recipe import ROOT, Recipe
from pipeline.tracking.tracker import Tracker, flatten

# Parameters that every run has, for tables of runs; of the others it has those that are not the
# default.
CENTRAL_KEYS: Mapping[str, IncEx | bool] = {
    "data": {
        "source_lang": True,
        "target_lang": True,
        "vocabulary": {"type", "size"},
        "image_size": True,
        "channels": True,
    },
    "model": {"architecture", "model_dim", "num_levels", "encoder_levels", "decoder_levels"},
    "training": {"seed", "max_steps", "max_tokens", "batch_size", "learning_rate"},
    "evaluation": {"average_checkpoints", "beam_size"},
}
# `DataFacts.names` has these in short.
NAMED_KEYS: Mapping[str, IncEx | bool] = {
    "data": {"train": True, "valid": True, "test": True, "downloads": True, "cleaning": {"filters"}}
}
DEEPSPEED_KEYS = (  # the rest is in deepspeed.json, or the recipe's
    "zero_optimization.stage",
    "zero_optimization.offload_optimizer.device",
    "zero_optimization.offload_param.device",
    "bf16.enabled",
    "fp16.enabled",
)
RECIPE = "recipe.json"  # has every key, and is a recipe as well: JSON is YAML
LONG_COMMAND = 80  # characters; MLflow does not wrap the lines of a program
PACKAGES = ("torch", "deepspeed", "fairseq2", "ctranslate2", "sentencepiece", "sacrebleu", "mlflow")


class DataFacts(NamedTuple):
    """What tracking tells of a run's data."""

    names: dict[str, str]
    """Parameters that say in short which data the recipe names."""

    manifest: Manifest | None
    """That of the shards; None if they are not here: a trained model was copied without them."""

    shape: dict[str, Any]
    """Parameters that say how much the shards hold."""

    files: tuple[Path, ...]
    """Reports and such."""

    sets: tuple[tuple[str, str, str], ...]
    """Of each data set that training reads: `training` or `validation`, its split, its name."""


def log_data(tracker: Tracker, recipe: Recipe, data: DataFacts) -> None:
    """Log the recipe, its data and what became of them; at first also code and machine.

    :raises OSError: one of their files cannot be read.
    """
    if not tracker.has_records:
        tracker.log_status("SCHEDULED")
        tracker.log_tags(_code_tags() | _machine_tags())
    _log_recipe(tracker, recipe)
    tracker.log_params(**_parameters(recipe, "data"), **data.names)
    if (manifest := data.manifest) is None:
        return
    tracker.log_params(shards=data.shape)
    tracker.log_json("data/manifest.json", manifest)
    for path in data.files:
        if path.exists():  # shards can be copied without what they were made from
            tracker.log_artifact(path, "data")
    for context, split, name in data.sets:
        files, digest = _files_of(manifest, split)
        profile = {"folder": str(recipe.shards.absolute()), **manifest["totals"][split]}
        tracker.log_input(name[:500], digest, context, {**profile, "sha256": files})


def _files_of(manifest: Manifest, split: str) -> tuple[dict[str, str], str]:
    """Return the sha256 of the shards of a split by name, and what MLflow calls the digest of the
    data set that they are."""
    files = {s["name"]: s["sha256"] for s in manifest["shards"] if s["split"] == split}
    return files, digest_of(files)[:16]


def how_to_reproduce(recipe: Recipe, data: DataFacts, tags: Mapping[str, str]) -> str:
    """Return what a training has to be given again to come out the same, as Markdown.

    :param tags: of the run.
    """
    rest = f"[{RECIPE}](artifact:{RECIPE}) has every key, and is a recipe as well."
    if "command" not in tags:  # its checkpoints were copied here
        return f"How it was trained is not known here. {rest}"
    commit = tags.get("mlflow.source.git.commit")
    lines = [f"git checkout {commit}"] * (commit is not None) + [_folded(tags["command"])]
    facts = [f"Seed {recipe.training.seed}"]
    if data.manifest is not None:
        facts += [
            f"{context} data `{name}` with the digest {_files_of(data.manifest, split)[1]}"
            for context, split, name in data.sets
        ]
    facts.append(f"torch {tags['version.torch']} on {tags['ranks']} rank(s), {tags['device']}")
    dirty = tags.get("git_dirty") == "true"
    changed = " The checkout had changes that are in no commit." if dirty else ""
    code = "\n".join(["```sh", *lines, "```"])
    return f"{code}\n\n{', '.join(facts)}.{changed} {rest}"


def log_training(
    tracker: Tracker,
    recipe: Recipe,
    deepspeed_config: dict[str, Any],
    *,
    ranks: int,
    device: str,
    core_parameters: int,
) -> None:
    """Log DeepSpeed's configuration, code and machine of a training that begins.

    :param core_parameters: without embeddings and output projection.
    """
    given = flatten(deepspeed_config)
    tracker.log_params(
        **_parameters(recipe, "model", "training", "evaluation"),
        deepspeed={key: given[key] for key in DEEPSPEED_KEYS if key in given},
    )
    tracker.log_tags(
        {
            **_code_tags(),
            **_machine_tags(),
            "ranks": str(ranks),
            "device": device,
            "core_parameters": str(core_parameters),
            "command": _command(),
        }
    )
    tracker.log_json("deepspeed.json", deepspeed_config)
    tracker.log_status("RUNNING")


def _command() -> str:
    """Return how this training is started by hand."""
    given = [each for each in sys.argv[1:] if not each.startswith("--local_rank")]
    launcher = os.environ.get("DEEPSPEED_ARGS")
    prefix = f"DEEPSPEED_ARGS={shlex.quote(launcher)} " if launcher else ""
    command = prefix + shlex.join(["./run.sh", *given])
    return without_password(command)


def without_password(text: str) -> str:
    """Return a text whose addresses name no user: a tracking server's password is nobody's
    business."""
    return re.sub(r"""(?<=://)[^\s/'"]*@""", "", text)


def _log_recipe(tracker: Tracker, recipe: Recipe) -> None:
    content = recipe.model_dump(mode="json", by_alias=True, exclude=recipe.unused)
    if uri := recipe.tracking.uri:
        content["tracking"]["uri"] = without_password(uri)
    tracker.log_json(RECIPE, content)


def _folded(command: str) -> str:
    """Return a long command with a line for each option."""
    if len(command) <= LONG_COMMAND:
        return command
    words = re.findall(r"""(?:[^\s'"]|'[^']*'|"[^"]*")+""", command)
    return "".join(f" \\\n    {word}" if word[:2] == "--" else f" {word}" for word in words)[1:]


def _parameters(recipe: Recipe, *sections: str) -> dict[str, Any]:
    """Return the keys of some sections that say what is special about a run, and `CENTRAL_KEYS`.

    All keys are in recipe.json.
    """
    special = recipe.model_dump(
        mode="json", include={*sections}, exclude=NAMED_KEYS, exclude_defaults=True
    )
    central = recipe.model_dump(mode="json", include=CENTRAL_KEYS, exclude=recipe.unused)
    return flatten({section: central[section] for section in sections}) | flatten(special)


def _code_tags() -> dict[str, str]:
    """Return tags with the commit of the checkout, and the versions of what is installed."""
    tags = {
        "version.python": platform.python_version(),
        "mlflow.source.name": ROOT.name,
        "mlflow.source.type": "LOCAL",
        "mlflow.user": os.environ.get("USER", "unknown"),
    }
    for package in PACKAGES:
        try:
            tags[f"version.{package}"] = version(package)
        except PackageNotFoundError:
            continue
    if (commit := _git("rev-parse", "HEAD")) is not None:
        tags["mlflow.source.git.commit"] = commit
        changed = _git("status", "--porcelain", "--untracked-files=no")
        new = _git("ls-files", "--others", "--exclude-standard", "--", "*.py", "ds_configs")
        tags["git_dirty"] = str(bool(changed or new)).lower()
    return tags


def _git(*arguments: str) -> str | None:
    """Return what a git command prints; None if there is no checkout, or no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _machine_tags() -> dict[str, str]:
    """Return tags with the name, cores and GPUs of this machine."""
    gpus = gpu_names()
    return {
        "host": socket.gethostname(),
        "cpus": str(len(os.sched_getaffinity(0))),
        "gpus": ", ".join(f"{gpus.count(name)} × {name}" for name in sorted(set(gpus))) or "none",
    }


def gpu_names() -> list[str]:
    """Return the names of this machine's NVIDIA GPUs."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    except pynvml.NVMLError:  # no driver
        return []
