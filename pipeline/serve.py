"""`./run.sh serve`: translate for clients of LibreTranslate's API, and for people on a page."""

# Functions import what serves themselves: --help and a wrong argument do not need it.

from __future__ import annotations

import argparse
import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.export_format import ModelError, read_settings
from pipeline.command_line import (
    on_signals,
    path_argument,
    positive_argument,
    run_command,
    text_argument,
)
from pipeline.recipe import UsageError
from pipeline.translation.lines import search_keys
from pipeline.translation_recipe import TranslationRecipe

if TYPE_CHECKING:
    from pipeline.server.app import Model

log = logging.getLogger("serve")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "--model", type=path_argument, action="append", required=True, metavar="FOLDER",
        help="folder written by `export`, in any format but huggingface; several times, for "
        "several pairs of languages",
    )  # fmt: skip
    parser.add_argument(
        "--host", type=text_argument, default="127.0.0.1",
        help="address to listen at [default 127.0.0.1: only this machine can reach it]",
    )  # fmt: skip
    parser.add_argument("--port", type=int, default=5050, help="0: any [default 5050]")
    for name, default, text in (
        ("max_characters", 5000, "of a request; more are refused"),
        ("max_waiting", 1000, "requests that wait for a model; one more is refused"),
        ("timeout", 60, "seconds that a request may take to arrive, and again to be answered"),
    ):
        parser.add_argument(
            f"--{name}", type=positive_argument, default=default, metavar="N",
            help=f"{text} [default {default}]",
        )  # fmt: skip


def main(recipe: TranslationRecipe, arguments: argparse.Namespace) -> None:
    """Serve until a signal comes; requests that are there then get their answers."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    search = search_keys(recipe, arguments)
    listener = open_listener(arguments.host, arguments.port)
    models: dict[tuple[str, str], Model] = {}
    for folder in arguments.model:
        model = load_model(folder, search)
        other = models.setdefault((model.source, model.target), model)
        if other is not model:
            raise UsageError(
                f"{other.folder} and {folder} both go from {model.source} to {model.target}; "
                "serve one of them"
            )
        log.info("%s to %s: %s, %s", model.source, model.target, folder, model.translator.backend)

    import uvicorn

    from pipeline.server.app import Limits, create_app

    limits = Limits(arguments.max_characters, arguments.max_waiting, arguments.timeout)
    config = uvicorn.Config(
        create_app(list(models.values()), limits), log_config=None, log_level="warning",
        access_log=False, timeout_graceful_shutdown=2 * limits.seconds,
    )  # fmt: skip
    server = uvicorn.Server(config)
    on_signals(server.handle_exit)
    listener.listen(2048)  # who reads the next line can connect
    host, port = listener.getsockname()[:2]
    log.info("http://%s:%d (Ctrl-C ends it)", f"[{host}]" if ":" in host else host, port)
    server.run(sockets=[listener])
    logging.shutdown()
    os._exit(0)  # all answers are sent; what nobody awaits any more need not be finished


def open_listener(host: str, port: int) -> socket.socket:
    """Return a socket that a server can listen at.

    :raises UsageError: it cannot.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Of sockets that do not say they are TCP's, asyncio lets the end of each answer wait 40 ms for
    # the client to acknowledge its beginning (Nagle's algorithm).
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        text = error.strerror if isinstance(error, OSError) else "ports have numbers up to 65535"
        raise UsageError(f"--host {host} --port {port}: {text}") from error
    return listener


def load_model(folder: Path, search: Mapping[str, Any]) -> Model:
    """Return the model in a folder.

    :param search: `evaluation` keys that differ from what it was exported with.
    :raises ModelError: the folder is not an exported model, or does not say its languages.
    """
    from pipeline.server.app import Model
    from pipeline.translation.translator import load_exports

    settings = read_settings(folder)
    if not settings.source_lang or not settings.target_lang:
        raise ModelError(f"{folder}: export.json does not say which languages the model is for")
    translator = load_exports(folder, **search)
    if translator.search.sampling_topk is not None:  # what is drawn depends on a line's place
        raise ModelError(
            f"{folder} draws its translations, and what a client gets would depend on the others: "
            "serve it with --evaluation.sampling_topk null"
        )
    translator.warns = False  # of the lines of clients
    return Model(settings.source_lang, settings.target_lang, folder, translator)


if __name__ == "__main__":
    run_command(
        "serve", "Serve exported models to clients of LibreTranslate's API, and a page.", main,
        add_arguments, kind=TranslationRecipe, continues=False,
    )  # fmt: skip
