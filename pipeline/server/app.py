"""The server: LibreTranslate's API over exported models, with a page, and metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect

from models.export_format import ABOUT, ModelError
from pipeline.server.batching import Batcher, Found
from pipeline.server.metrics import Metrics
from pipeline.server.request import OPENAPI, TranslateRequest, parse, read_body
from pipeline.translation.serving import TextTranslator
from pipeline.translation.translator import Translator

if TYPE_CHECKING:
    from pipeline.translation.alignment import Link

T = TypeVar("T")

PAGE = Path(__file__).with_name("page.html")
POLICY = (  # the page has all that it needs
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:"
)
BYTES_OF_CHARACTER = 12  # at most, in a body: \ud83d\ude00 or %F0%9F%98%80


class Limits(NamedTuple):
    """What clients may ask for."""

    characters: int
    """Of a request."""

    waiting: int
    """Requests that wait for a model; one more is refused."""

    seconds: int
    """A request may take to arrive, and again to be answered."""


class Model(NamedTuple):
    """A model that is served."""

    source: str
    """The code of a language."""

    target: str
    folder: Path
    translator: TextTranslator


class Translated(BaseModel):
    """The answer to a request: lists have something for each of its texts, if it has a list."""

    translatedText: str | list[str]

    alternatives: list[str] | list[list[str]] | None = None
    """Other translations, best first."""

    alignment: list[tuple[int, int]] | list[list[tuple[int, int]]] | None = None
    """Words of the text and of its translation that belong together, from 0."""

    unseenWords: list[str] | list[list[str]] | None = None
    """Words of the text that the model was never trained on, if there are any."""


class Language(BaseModel):
    """A language, and what it can be translated to."""

    code: str
    name: str
    targets: list[str]


class About(BaseModel):
    """What the page says of a model."""

    source: str
    target: str
    name: str
    backend: str
    bytes: int
    alignment: bool
    card: str


class Service:
    """Models at work, each with its queue."""

    def __init__(self, models: Sequence[Model], limits: Limits) -> None:
        """Make the queues.

        :param models: of different pairs of languages.
        """
        self.limits, self.metrics = limits, Metrics()
        self.models = {(model.source, model.target): model for model in models}
        self._batchers: dict[tuple[str, str], Batcher] = {}
        for pair, model in self.models.items():
            on_batch = self.metrics.batch_lines.labels(*pair).observe
            self._batchers[pair] = Batcher(model.translator, limits.waiting, on_batch)
            self.metrics.waiting.labels(*pair).set_function(self._batchers[pair].waiting)

    @asynccontextmanager
    async def at_work(self, app: FastAPI) -> AsyncIterator[None]:
        """Translate what comes while the block is at work."""
        tasks = [asyncio.create_task(batcher.run()) for batcher in self._batchers.values()]
        yield
        for task in tasks:
            task.cancel()

    async def translate(self, request: Request) -> Translated:
        """Answer a request.

        :raises HTTPException: it is wrong, or there is too much to do.
        """
        started, status = time.perf_counter(), 500
        try:
            wanted = await self._read(request)
            answer = await self._answer(wanted, request)
            status = 200
            return answer
        except AnyHTTPException as error:
            status = error.status_code
            raise
        except ClientDisconnect:
            status = 499  # as nginx counts it
            raise
        finally:
            self.metrics.seconds.labels(status).observe(time.perf_counter() - started)

    async def _read(self, request: Request) -> TranslateRequest:
        """Return what a client wants, if it may have it."""
        limits = self.limits
        body = read_body(request, BYTES_OF_CHARACTER * limits.characters + 4096)
        try:
            content = await asyncio.wait_for(body, limits.seconds)
        except asyncio.TimeoutError as error:
            text = f"the request did not arrive within {limits.seconds} s"
            raise HTTPException(408, text) from error
        wanted = parse(content, request.headers.get("content-type", ""))
        if (characters := sum(map(len, wanted.texts))) > limits.characters:
            raise HTTPException(
                413, f"{characters:,} characters; a request may have {limits.characters:,}"
            )
        if (wanted.source, wanted.target) not in self.models:
            pairs = ", ".join(f"{source} to {target}" for source, target in self.models)
            raise HTTPException(
                400, f"no model here goes from {wanted.source} to {wanted.target}, but {pairs}"
            )
        self.metrics.characters.labels(wanted.source, wanted.target).inc(characters)
        return wanted

    async def _answer(self, wanted: TranslateRequest, request: Request) -> Translated:
        pair = wanted.source, wanted.target
        lines_of = [text.split("\n") for text in wanted.texts]
        lines = [line for own in lines_of for line in own]
        try:
            submitted = self._batchers[pair].submit(lines)
        except asyncio.QueueFull as error:
            text = f"{self.limits.waiting:,} requests are waiting already; try again later"
            raise HTTPException(429, text, {"Retry-After": "1"}) from error
        deadline = time.monotonic() + self.limits.seconds
        of_lines = await self._await(submitted, request, deadline)
        each = iter(of_lines)
        found = [[next(each) for _ in own] for own in lines_of]
        # Alternatives and links are those of a line; a text of several has none.
        alone = [text[0] if len(text) == 1 else [] for text in found]
        aligned = wanted.alignment and shows_alignment(self.models[pair].translator)
        links: list[list[Link]] = [[] for _ in alone]
        if aligned:
            links_of = asyncio.ensure_future(self._links(pair, wanted.texts, alone))
            links = await self._await(links_of, request, deadline)

        def one_or_all(values: list[T]) -> T | list[T]:
            return values[0] if isinstance(wanted.q, str) else values

        unseen = [self.models[pair].translator.unseen([text]) for text in wanted.texts]
        answer = ["\n".join(best[0].text for best in text) for text in found]
        others = [[other.text for other in best[1 : 1 + wanted.alternatives]] for best in alone]
        return Translated(
            translatedText=one_or_all(answer),
            alternatives=one_or_all(others) if wanted.alternatives else None,
            alignment=one_or_all(links) if aligned else None,
            unseenWords=one_or_all(unseen) if any(unseen) else None,
        )

    async def _links(
        self, pair: tuple[str, str], texts: Sequence[str], found: Found
    ) -> list[list[Link]]:
        """Return which words of each text's best translation come from which of its own; of a text
        without translations none."""
        from pipeline.translation.alignment import align_translations, check_engine

        translator = check_engine(self.models[pair].translator)
        best = [translations[:1] for translations in found]
        links = await self._batchers[pair].in_thread(
            lambda: align_translations(translator, texts, best)
        )
        return [own[0] if own else [] for own in links]

    async def _await(self, found: asyncio.Future[T], request: Request, deadline: float) -> T:
        """Return what is found; if its time is over or the client leaves first, nobody looks for it
        any more.

        :param deadline: by the monotonic clock.
        """
        leaves = asyncio.ensure_future(request.receive())  # the body has been read
        either: set[asyncio.Future[Any]] = {found, leaves}
        left = max(0.0, deadline - time.monotonic())
        try:
            await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if found.done():
                return found.result()
        finally:
            leaves.cancel()
            found.cancel()
        if leaves.done():
            raise ClientDisconnect
        seconds = self.limits.seconds
        raise HTTPException(504, f"no translation within {seconds} s; try again later")


def shows_alignment(translator: TextTranslator) -> bool:
    """Tell whether a translator shows which words come from which."""
    return isinstance(translator, Translator)


def about(model: Model) -> About:
    """Return what the page says of a model."""
    files = [path for path in model.folder.glob("[!.]*") if path.is_file()]
    card = model.folder / "README.md"
    return About(
        source=model.source,
        target=model.target,
        name=model.folder.resolve().name,
        backend=model.translator.backend,
        bytes=sum(path.stat().st_size for path in files if path.name not in ABOUT),
        alignment=shows_alignment(model.translator),
        card=card.read_text(encoding="utf-8") if card.is_file() else "",
    )


def create_app(models: Sequence[Model], limits: Limits) -> FastAPI:
    """Return the server's application.

    :param models: of different pairs of languages.
    """
    service = Service(models, limits)
    # /docs has its script and style from here, not from a public server.
    app = FastAPIOffline(redoc_url=None, title="RingFormer translation", lifespan=service.at_work)
    all_about, page = [about(model) for model in models], PAGE.read_text(encoding="utf-8")

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    @app.post("/translate", openapi_extra=OPENAPI, response_model=Translated)
    async def translate(request: Request) -> Response:
        """Translate a text or several, each of one line or several."""
        answer = await service.translate(request)
        return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")

    @app.get("/languages")
    async def languages() -> list[Language]:
        """List languages, and what each can be translated to."""
        codes = sorted({code for pair in service.models for code in pair})
        return [
            Language(code=code, name=code, targets=[t for s, t in service.models if s == code])
            for code in codes
        ]

    @app.get("/models")
    async def tell_of_models() -> list[About]:
        """Tell of each model what it is, how large, and its card."""
        return all_about

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Answer."""
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Tell Prometheus how it goes."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(AnyHTTPException)
    async def refuse(request: Request, error: AnyHTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(ModelError)
    async def give_up(request: Request, error: ModelError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 500)

    @app.exception_handler(ClientDisconnect)
    async def forget(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # nobody reads it

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": "the server failed; its log says how"}, 500)

    return app
