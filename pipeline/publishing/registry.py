"""The evaluated model in MLflow's registry; `champion` is the best by paired bootstrap."""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr
from importlib.metadata import version
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING

from data_prep.files import read_json, write_json
from pipeline.checkpoints.folder import Checkpoint
from pipeline.evaluation.comparison import compare, logged
from pipeline.evaluation.results import Result
from pipeline.recipe import ROOT, Recipe, UsageError
from pipeline.tracking.mlflow_records import client_of, short
from pipeline.tracking.tracker import run_id_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger("evaluate")

CHAMPION = "champion"
NEEDED = ("mlflow", "ctranslate2", "sentencepiece")  # to serve it
SERVED_CODE = (  # all of ours that it takes
    "pipeline/__init__.py",
    "pipeline/translation/__init__.py",
    "pipeline/translation/serving.py",
)


def register(recipe: Recipe, checkpoints: Sequence[Checkpoint], result: Result) -> None:
    """Log the average of `checkpoints` as a new version of the registered model, and move the alias
    `champion` to it if it is better. Done once for an evaluation.

    :param result: of these checkpoints.

    A server that cannot be reached is told of; the next `./run.sh evaluate` tries again.
    """
    run_id, done = run_id_of(recipe), recipe.run_dir / "tracking" / "registered.json"
    known = read_json(done)  # for each tracking store: what was registered last
    name = _name(recipe, result)
    wanted = [run_id, name, result.fingerprint]
    if known.get(recipe.tracking_uri) == wanted:
        return
    try:
        if run_id is None:
            raise ConnectionError("the run is not there yet")
        client = client_of(recipe.tracking_uri)
        found = _register(client, name, recipe, checkpoints, result, run_id)
    except UsageError as error:  # the architecture is no standard Transformer
        log.warning("not registered: %s", error)
        return
    except Exception as error:  # whatever the server or the network does, the scores are there
        log.warning(
            "not registered in %s: %s; `./run.sh evaluate` tries again",
            recipe.tracking_uri,
            short(error),
        )
        return
    write_json(done, {**known, recipe.tracking_uri: wanted})
    log.info("%s", found)


def _name(recipe: Recipe, result: Result) -> str:
    languages = f"{recipe.data.source_lang}-{recipe.data.target_lang}"
    default = f"{recipe.tracking.experiment}-{languages}-{result.test_set.slug}"
    return recipe.tracking.registered_model or default


def _register(
    client: MlflowClient,
    name: str,
    recipe: Recipe,
    checkpoints: Sequence[Checkpoint],
    result: Result,
    run_id: str,
) -> str:
    """:returns: what was done."""
    from pipeline.publishing.exports import export

    mine = f"name = '{name}' and tags.fingerprint = '{result.fingerprint}'"
    versions = [v for v in client.search_model_versions(mine) if v.run_id == run_id]
    if versions:
        new = versions[0]
    else:
        folder = recipe.run_dir / "tracking" / "model"
        export(recipe, folder, "ctranslate2", checkpoints=checkpoints)
        new = _log_model(client, name, recipe, folder, result, run_id)
    verdict = _move_champion(client, recipe, result, new)
    return f"registered as {name} version {new.version}: {verdict}"


def _log_model(
    client: MlflowClient, name: str, recipe: Recipe, folder: Path, result: Result, run_id: str
) -> ModelVersion:
    """:param folder: the exported model."""
    import mlflow
    from mlflow.models import Model

    card = (folder / "README.md").read_text(encoding="utf-8")
    example = [line for line in result.test_set.sources if line.strip()][:2]
    mlflow.set_tracking_uri(recipe.tracking_uri)
    mlflow.set_experiment(experiment_id=client.get_run(run_id).info.experiment_id)
    with tempfile.TemporaryDirectory() as place, redirect_stderr(io.StringIO()):  # it is chatty
        for path in SERVED_CODE:
            (Path(place) / path).parent.mkdir(parents=True, exist_ok=True)
            copyfile(ROOT / path, Path(place) / path)
        logged = Model.log(
            None,
            mlflow.pyfunc,
            name=f"model-{result.fingerprint[:8]}",
            run_id=run_id,
            registered_model_name=name,
            step=result.scores["step"],
            python_model=str(ROOT / "pipeline" / "publishing" / "served_model.py"),
            artifacts={"model": str(folder.absolute())},
            code_paths=sorted({str(Path(place) / Path(path).parts[0]) for path in SERVED_CODE}),
            input_example=example,
            pip_requirements=[f"{package}=={version(package)}" for package in NEEDED],
        )
    new = client.get_model_version(name, logged.registered_model_version)
    tags = {
        "test_set": result.test_set.name,
        "evaluation": result.artifact_folder,
        **{key: str(result.scores[key]) for key in ("bleu", "bleu_ci", "bleu_signature")},
        "fingerprint": result.fingerprint,  # last: with it the version is complete
    }
    client.update_model_version(new.name, new.version, description=card)
    for key, value in tags.items():
        client.set_model_version_tag(new.name, new.version, key, value)
    return new


def _move_champion(client: MlflowClient, recipe: Recipe, result: Result, new: ModelVersion) -> str:
    """Move the alias if `new` is better than the one that has it. :returns: what was found."""
    champion = _champion(client, new.name)
    if champion is None:
        verdict = "the first, and so champion"
    elif champion.version == new.version:
        return "is champion"
    else:
        run_id, folder = str(champion.run_id), champion.tags.get("evaluation", "")
        other = logged(client, run_id, folder) if folder else None
        if other is None:
            return f"version {champion.version} stays champion: its evaluation cannot be had"
        if (comparison := compare(recipe, result, other)) is None:
            return (
                f"version {champion.version} stays champion: it was scored on other sentences "
                f"({champion.tags.get('test_set')})"
            )
        if not comparison.better:
            return f"version {champion.version} stays champion: {comparison}"
        verdict = f"champion instead of version {champion.version}: {comparison}"
    client.set_registered_model_alias(new.name, CHAMPION, new.version)
    return verdict


def _champion(client: MlflowClient, name: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
