"""`./run.sh dashboard`: MLflow's UI over the recipe's tracking store, on this machine only."""

# `_runs_page` imports mlflow itself: that takes seconds, and --help and a wrong argument need none.

from __future__ import annotations

import argparse
import os
import sys

from pipeline.command_line import run_command
from pipeline.recipe import Recipe

SERVER_SETTINGS = {  # environment variables, unless the user has set them
    "MLFLOW_DISABLE_TELEMETRY": "true",  # nothing leaves this machine, and it works offline
    # It would start seven processes of 0.2 GB that wait for LLM jobs.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("--port", type=int, default=5000, help="port on 127.0.0.1 [default 5000]")


def main(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Become the server; or say where it is, if the recipe tracks to a server already."""
    uri = recipe.tracking_uri
    if uri.startswith(("http://", "https://")):
        print(f"The recipe tracks to a server; its dashboard is {uri}")
        return
    recipe.run_dir.absolute().parent.mkdir(parents=True, exist_ok=True)
    for name, value in SERVER_SETTINGS.items():
        os.environ.setdefault(name, value)
    address = f"http://127.0.0.1:{arguments.port}"
    page = address + _runs_page(recipe)
    print(f"dashboard: {page} over {uri} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    server = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    server += ["--host", "127.0.0.1", "--port", str(arguments.port), "--workers", "1"]
    os.execv(sys.executable, server)


def _runs_page(recipe: Recipe) -> str:
    """Return the path of the page with charts of the recipe's experiment.

    MLflow's home page would show what it has for LLMs.
    """
    from mlflow import MlflowClient

    experiment = MlflowClient(recipe.tracking_uri).get_experiment_by_name(
        recipe.tracking.experiment
    )
    if experiment is None:
        return ""
    view = "workflowType=machine_learning&compareRunsMode=CHART"
    return f"/#/experiments/{experiment.experiment_id}/runs?{view}"


if __name__ == "__main__":
    run_command("dashboard", "Serve the MLflow dashboard.", main, add_arguments)
