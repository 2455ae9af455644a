"""`./run.sh dashboard`: MLflow's UI over the recipe's tracking store, on this machine only."""

from __future__ import annotations

import argparse
import os
import sys

from pipeline.config import Recipe, run_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=5000, help="port on 127.0.0.1 [default 5000]")


def main(recipe: Recipe, arguments: argparse.Namespace) -> None:
    uri = recipe.tracking_uri
    if uri.startswith(("http://", "https://")):
        print(f"The recipe tracks to a server; its dashboard is {uri}")
        return
    recipe.run_dir.absolute().parent.mkdir(parents=True, exist_ok=True)
    address = f"http://127.0.0.1:{arguments.port}"
    print(f"dashboard: {address} over {uri} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    server = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    server += ["--host", "127.0.0.1", "--port", str(arguments.port), "--workers", "1"]
    os.execv(sys.executable, server)


if __name__ == "__main__":
    run_command("dashboard", "Serve the MLflow dashboard.", main, add_arguments)
