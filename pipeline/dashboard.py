"""`./run.sh dashboard`: MLflow's UI over the recipe's tracking store, on this machine only."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import requests

from pipeline.command_line import on_signals, run_command
from pipeline.recipe import Recipe, UsageError
from pipeline.tracking.moved_store import follow_store

HOST = "127.0.0.1"
SERVER_SETTINGS = {  # environment variables, unless the user has set them
    "MLFLOW_DISABLE_TELEMETRY": "true",  # nothing leaves this machine, and it works offline
    # It would start seven processes of 0.2 GB that wait for LLM jobs.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


class DashboardError(Exception):
    """MLflow's server does not run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("--port", type=int, default=5000, help=f"port on {HOST} [default 5000]")


def main(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Serve until a signal comes; or say where the server is, if the recipe tracks to one."""
    uri = recipe.tracking_uri
    if uri.startswith(("http://", "https://")):
        print(f"The recipe tracks to a server; its dashboard is {uri}")
        return
    check_port(arguments.port)
    recipe.run_dir.absolute().parent.mkdir(parents=True, exist_ok=True)
    follow_store(recipe)
    address = f"http://{HOST}:{arguments.port}"
    on_signals(signal.default_int_handler)
    try:
        with _server(uri, arguments.port) as (server, errors):
            if _listens(server, arguments.port):
                errors.tell = True
                page = address + _runs_page(address, recipe.tracking.experiment)
                print(f"dashboard: {page} over {uri} (Ctrl-C ends it)", file=sys.stderr, flush=True)
            server.wait()
            errors.join()
    except KeyboardInterrupt:
        return  # as one ends it
    raise DashboardError(f"MLflow's server over {uri} has ended{errors.last}")


def check_port(port: int) -> None:
    """Check that a server can listen there.

    :raises UsageError: it cannot.
    """
    if not 1 <= port <= 65535:
        raise UsageError(f"--port {port}: ports have numbers from 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UsageError(f"--port {port}: {error.strerror}; choose another one") from error


class _Errors(Thread):
    """Reads what the server says. Of a traceback, the line that says what happened is repeated."""

    def __init__(self, server: subprocess.Popen[str], uri: str) -> None:
        super().__init__(daemon=True)
        self._server, self._uri = server, uri
        self.last = ""
        self.tell = False  # before the server listens, the error that ends it is told by `main`
        self.start()

    def run(self) -> None:
        assert self._server.stdout is not None
        in_traceback, told = False, ""
        for line in self._server.stdout:
            if line.startswith("Traceback "):
                in_traceback = True
            elif in_traceback and not line.startswith((" ", "\n")):
                in_traceback = False
                self.last = f": {line.strip()}"
                if self.tell and self.last != told:  # it may happen at every request
                    told = self.last
                    print(f"dashboard: MLflow over {self._uri}{told}", file=sys.stderr, flush=True)
            elif line.startswith("Error: "):
                self.last = f": {line.strip()}"


@contextmanager
def _server(uri: str, port: int) -> Iterator[tuple[subprocess.Popen[str], _Errors]]:
    """Start MLflow's server, and stop it in the end."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", HOST, "--port", str(port), "--workers", "1"]
    # By default it would look for modules in the current folder.
    command += ["--uvicorn-opts", f"--app-dir {shlex.quote(sys.prefix)}"]
    server = subprocess.Popen(
        command,
        env={**SERVER_SETTINGS, **os.environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        yield server, _Errors(server, uri)
    finally:
        server.terminate()
        server.wait()


def _listens(server: subprocess.Popen[str], port: int) -> bool:
    """Wait until the server listens, and return True; False if it ends before."""
    while server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                return True
        time.sleep(0.1)
    return False


def _runs_page(address: str, experiment: str) -> str:
    """Return the path of the page with charts of an experiment; none if there is no such one.

    MLflow's home page would show what it has for LLMs.
    """
    try:
        found = requests.get(
            f"{address}/api/2.0/mlflow/experiments/get-by-name",
            params={"experiment_name": experiment},
            timeout=60,
        ).json()
        number = found["experiment"]["experiment_id"]
    except (requests.RequestException, KeyError):
        return ""
    view = "workflowType=machine_learning&compareRunsMode=CHART"
    return f"/#/experiments/{number}/runs?{view}"


if __name__ == "__main__":
    run_command("dashboard", "Serve the MLflow dashboard.", main, add_arguments, kind=Recipe)
