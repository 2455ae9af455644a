"""Register evaluated models in MLflow; the alias `champion` is on the best of them."""

# Functions import mlflow themselves: that takes seconds, and a model that is registered needs none.

from __future__ import annotations

import io
import logging
import tempfile
from contextlib import redirect_stderr
from importlib.metadata import version
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING

from data_prep.files import read_json, write_json
from pipeline.evaluation.comparison import compare, download_evaluation
from pipeline.evaluation.result import Result
from pipeline.publishing.model_card import as_text
from pipeline.publishing.servable import Servable
from pipeline.recipe import ROOT, Recipe, UsageError
from pipeline.tracking.mlflow_records import client_of, describe_error
from pipeline.tracking.tracker import run_id_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger("evaluate")

CHAMPION = "champion"


def register(recipe: Recipe, servable: Servable, result: Result, validation: Result) -> None:
    """Register an evaluated model, and move the alias `champion` to it if it is better on
    the validation set: whoever picks the best of many on the test set reports a score that luck
    has picked with it.

    An evaluation is registered once, as a new version of the registered model. Errors of MLflow or
    the network become a warning, and the next `./run.sh evaluate` tries again.

    :param result: of the model on the test set; it is what the version reports.
    :param validation: of the model on the validation set.
    """
    run_id, done = run_id_of(recipe), recipe.run_dir / "tracking" / "registered.json"
    known = read_json(done)  # tracking store → what was registered there last
    name = recipe.tracking.registered_model or servable.default_name
    wanted = [run_id, name, result.fingerprint, validation.fingerprint]
    if known.get(recipe.tracking_uri) == wanted:
        return
    try:
        if run_id is None:
            raise ConnectionError("the run is not there yet")
        client = client_of(recipe)
        new = _find_or_make_version(client, name, recipe, servable, result, run_id)
        client.set_model_version_tag(name, new.version, "validation", validation.artifact_folder)
        verdict = _move_champion(client, result, validation, new)
        client.set_tag(run_id, "registered", f"{name} version {new.version}: {verdict}")
    except UsageError as error:  # the architecture cannot be exported as a standard Transformer
        log.warning("not registered: %s", error)
        return
    except Exception as error:  # MLflow's and the network's are of many types; scores are there
        log.warning(
            "not registered in %s: %s; `./run.sh evaluate` tries again",
            recipe.tracking_uri,
            describe_error(error),
        )
        return
    write_json(done, {**known, recipe.tracking_uri: wanted})
    log.info("registered as %s version %s: %s", name, new.version, verdict)


def _find_or_make_version(
    client: MlflowClient,
    name: str,
    recipe: Recipe,
    servable: Servable,
    result: Result,
    run_id: str,
) -> ModelVersion:
    """Return the version of the registered model with this result; make it if there is none."""
    mine = f"tags.fingerprint = '{result.fingerprint}'"  # a name could have quotes
    found = client.search_model_versions(mine)
    versions = [v for v in found if v.name == name and v.run_id == run_id]
    if versions:
        return versions[0]
    folder = recipe.run_dir / "tracking" / "model"
    servable.export(folder)
    return _log_model(client, name, recipe, servable, folder, result, run_id)


def _log_model(
    client: MlflowClient,
    name: str,
    recipe: Recipe,
    servable: Servable,
    folder: Path,
    result: Result,
    run_id: str,
) -> ModelVersion:
    """Upload an exported model as a new version of the registered model `name`.

    :param folder: of the exported model.
    """
    import mlflow
    from mlflow.models import Model

    card = (folder / "README.md").read_text(encoding="utf-8")
    mlflow.set_tracking_uri(recipe.tracking_uri)
    mlflow.set_experiment(experiment_id=client.get_run(run_id).info.experiment_id)
    with tempfile.TemporaryDirectory() as place, redirect_stderr(io.StringIO()):  # it is chatty
        for path in servable.code:
            (Path(place) / path).parent.mkdir(parents=True, exist_ok=True)
            copyfile(ROOT / path, Path(place) / path)
        info = Model.log(
            None,
            mlflow.pyfunc,
            name=f"model-{result.fingerprint[:8]}",
            run_id=run_id,
            registered_model_name=name,
            step=result.scores["step"],
            python_model=str(ROOT / "pipeline" / "publishing" / servable.program),
            artifacts={"model": str(folder.absolute())},
            code_paths=sorted({str(Path(place) / Path(path).parts[0]) for path in servable.code}),
            input_example=servable.example,
            pip_requirements=[f"{package}=={version(package)}" for package in servable.packages],
        )
    new = client.get_model_version(name, info.registered_model_version)
    tags = {
        "test_set": result.test_set_name,
        "test_set_sha256": result.test_set_sha256,
        "evaluation": result.artifact_folder,
        **{key: str(result.scores[key]) for key in servable.tags},
        "fingerprint": result.fingerprint,  # comes last: a version that has it is complete
    }
    client.update_model_version(new.name, new.version, description=as_text(card))
    for key, value in tags.items():
        client.set_model_version_tag(new.name, new.version, key, value)
    return new


def _move_champion(
    client: MlflowClient, result: Result, validation: Result, new: ModelVersion
) -> str:
    """Move the alias `champion` to `new` if it is better than the version that has it.

    :param result: of `new`, on the test set.
    :param validation: on the validation set.
    :returns: the verdict, in words.
    """
    champion = _champion(client, new.name)
    if champion is None:
        verdict = "the first, and so champion"
    elif champion.version == new.version:
        return "is champion"
    else:
        run_id, folder = str(champion.run_id), champion.tags.get("validation", "")
        other = download_evaluation(client, run_id, folder, type(validation)) if folder else None
        if other is None:
            return (
                f"version {champion.version} stays champion: its answers to the validation "
                "set cannot be had; move the alias by hand"
            )
        if (comparison := compare(validation, other)) is None:
            return (
                f"version {champion.version} stays champion: it was validated on other examples; "
                "move the alias by hand"
            )
        step = validation.scores["step"]
        client.log_metric(str(new.run_id), "quality/p_against_champion", comparison.p, step=step)
        told = f"on {validation.test_set_name} {comparison}"
        if not comparison.better:
            own = result.test_set_sha256
            if champion.tags.get("test_set_sha256", own) != own:
                told += (
                    f"; its scores are of another text or other images of {result.test_set_name}"
                )
            return f"version {champion.version} stays champion: {told}"
        verdict = f"champion instead of version {champion.version}: {told}"
    client.set_registered_model_alias(new.name, CHAMPION, new.version)
    return verdict


def _champion(client: MlflowClient, name: str) -> ModelVersion | None:
    """Return the version that has the alias `champion`; None if there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
