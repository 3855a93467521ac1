"""The application: routes behind the door, the engine's life, and an OpenAPI document that says what is understood."""

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import httpx
from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request

from safety_neurons import __version__
from safety_neurons.guard.server import verdicts as judging
from safety_neurons.guard.server.chat import ROUTE as CHAT
from safety_neurons.guard.server.chat import Chat
from safety_neurons.guard.server.door import OPEN, Door, Log
from safety_neurons.guard.server.engine import Engine, Judge, Writer
from safety_neurons.guard.server.gate import Gate
from safety_neurons.guard.server.metrics import Metrics
from safety_neurons.guard.server.problems import Problem, unforeseen
from safety_neurons.guard.server.reading import parse, validated
from safety_neurons.guard.server.settings import Settings
from safety_neurons.guard.server.shapes import (
    ChatRequest,
    ClassifyAnswer,
    ClassifyRequest,
    ErrorAnswer,
    GuardrailAnswer,
    GuardrailRequest,
    Health,
    Model,
    Models,
    ModerationAnswer,
    ModerationRequest,
)
from safety_neurons.guard.server.upstream import Upstream

ERRORS = (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 502, 503, 504)
_NAMES = {404: "not_found", 405: "method_not_allowed"}


class Service:
    """Everything a server consists of. `asgi` is what a web server runs.

    Args:
        settings: How it behaves.
        judge: A bound guard, as the engine takes it.
        writer: Answers with the local model; not asked where there is an upstream.
        metrics: Counts.
        log: Told one event a request.
        batch_tokens: Padded tokens of a forward pass, where the settings leave it open.
        transport: In the place of the network to the upstream, for tests.
    """

    def __init__(
        self,
        settings: Settings,
        judge: Judge,
        metrics: Metrics,
        writer: Writer | None = None,
        *,
        log: Log = lambda _: None,
        batch_tokens: int = 2048,
        transport: httpx.AsyncBaseTransport | None = None,
        standing: dict[str, Any] | None = None,
    ) -> None:
        limits = settings.limits
        self.settings, self.metrics, self.standing = settings, metrics, standing
        self.engine = Engine(
            judge,
            writer if settings.upstream is None else None,
            batch=limits.batch,
            batch_tokens=limits.batch_tokens or batch_tokens,
            waiting=limits.waiting,
            characters=limits.characters,
            observe=self._observe,
        )
        metrics.waiting.set_function(lambda: self.engine.waiting)
        self.gate = Gate(self.engine, settings, metrics)
        self.upstream = None if settings.upstream is None else Upstream(settings, metrics, transport)
        self.chat = Chat(settings, self.gate, self.upstream, log)
        self.verdicts = judging.Verdicts(settings, self.gate)
        self.created = int(time.time())
        self.app = _application(self)
        self.asgi = Door(self.app, settings, metrics, log)

    def _observe(self, rows: int, seconds: float) -> None:
        self.metrics.batches.observe(rows)
        self.metrics.batch_seconds.observe(seconds)

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self.engine.alive and not self.asgi.closing

    @contextlib.asynccontextmanager
    async def life(self, _: FastAPI) -> AsyncIterator[None]:
        """Starts the engine, and ends it when what was accepted is finished."""
        self.app.openapi()  # kept; made while nobody waits
        self.engine.start()
        try:
            yield
        finally:
            self.asgi.closing = True
            await self.engine.close(self.settings.limits.drain_seconds)
            if self.upstream is not None:
                await self.upstream.close()


def _application(service: Service) -> FastAPI:
    app = FastAPI(
        title="safety-neurons guard",
        version=__version__,
        summary="Verdicts on prompts before they are answered, and answers to those that are not flagged.",
        lifespan=service.life,
        redirect_slashes=False,
        docs_url="/docs" if service.settings.docs else None,
        redoc_url=None,
    )
    app.add_exception_handler(Problem, _shown)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _not_served)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _unforeseen)
    _add_posts(app, service)
    _add_gets(app, service)
    _document(app, service)
    return app


async def _shown(request: Request, problem: Problem) -> Response:
    request.scope["noted"]["code"] = problem.code
    return JSONResponse(problem.record, problem.status, problem.headers)


async def _not_served(request: Request, error: HTTPException) -> Response:
    code = _NAMES.get(error.status_code, "http_error")
    headers = dict(error.headers or {})
    if "Allow" in headers:
        taken = {method.strip() for method in headers["Allow"].split(",")}
        headers["Allow"] = ", ".join(sorted(taken | {"OPTIONS"} | ({"HEAD"} if "GET" in taken else set())))
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=headers)
    problem = Problem(error.status_code, f"there is no {request.method[:16]} here; see /openapi.json for the routes", code, headers=headers)
    return await _shown(request, problem)


async def _unforeseen(request: Request, _: Exception) -> Response:
    """Answered here; it goes on to the door, which counts and logs it."""
    problem = unforeseen(request.scope["request_id"])
    return JSONResponse(problem.record, problem.status)


def _add_posts(app: FastAPI, service: Service) -> None:
    """Routes that take a body: read strictly, checked, then handled."""
    depth = service.settings.limits.depth

    async def read(request: Request, shape: type[Any]) -> tuple[Any, dict[str, Any]]:
        value = parse(await request.body(), depth)
        return validated(value, shape), value

    async def chat(request: Request) -> Response:
        """Answers a conversation unless the guard flags it: then a refusal with `finish_reason` `content_filter`."""
        checked, body = await read(request, ChatRequest)
        return await service.chat.answer(checked, body, request.scope["noted"], request.scope["request_id"])

    def judging_route(shape: type[BaseModel], judge: Callable[[Any, dict[str, Any]], Awaitable[Mapping[str, Any]]]) -> Any:
        async def route(request: Request) -> Response:
            checked, _ = await read(request, shape)
            return JSONResponse(dict(await judge(checked, request.scope["noted"])))

        route.__doc__ = judge.__doc__
        return route

    verdicts = service.verdicts
    _post(app, CHAT, "chat", chat, ChatRequest, None)
    for path, name, shape, judge, answer in (
        (judging.MODERATIONS, "moderations", ModerationRequest, verdicts.moderate, ModerationAnswer),
        (judging.CLASSIFY, "classify", ClassifyRequest, verdicts.classify, ClassifyAnswer),
        (judging.GUARDRAIL, "guardrail", GuardrailRequest, verdicts.guardrail, GuardrailAnswer),
    ):
        _post(app, path, name, judging_route(shape, judge), shape, answer)


def _post(app: FastAPI, path: str, name: str, handler: Any, shape: type[BaseModel], answer: type[BaseModel] | None) -> None:
    # The body is read by hand, so its shape is told to the document by hand.
    schema = shape.model_json_schema(ref_template="#/components/schemas/{model}")
    body = {"required": True, "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{shape.__name__}"}}}}
    handler.shapes = {**schema.pop("$defs", {}), shape.__name__: schema}
    responses: dict[int | str, Any] = {200: {"model": answer} if answer else {"description": "An answer, whole or as server-sent events."}}
    app.add_api_route(
        path,
        handler,
        methods=["POST"],
        name=name,
        operation_id=name,
        openapi_extra={"requestBody": body},
        responses=responses,
        response_model=None,
    )


def _add_gets(app: FastAPI, service: Service) -> None:
    local = Model(id=service.settings.name, object="model", created=service.created, owned_by="safety-neurons")

    async def models() -> Response:
        """The models that can be asked."""
        if service.upstream is None:
            return JSONResponse(Models(object="list", data=[local]).model_dump())
        status, headers, content = await service.upstream.models()
        return Response(content, status, headers, media_type="application/json")

    async def model(name: str) -> Response:
        """One of the models that can be asked."""
        if service.upstream is not None or name != local.id:
            raise Problem(404, "there is no model of this name here; expected one of GET /v1/models", "model_not_found", param="model")
        return JSONResponse(local.model_dump())

    async def healthz() -> Response:
        """Whether the process is there and can go on: 503 once the engine has failed."""
        failed = service.engine.failed is not None
        return JSONResponse(Health(status="failed" if failed else "ok").model_dump(exclude_none=True), 503 if failed else 200)

    async def readyz() -> Response:
        """Whether requests are taken: 503 while the server starts or closes."""
        found = Health(status="ready" if service.ready else "not ready", guard=service.standing)
        return JSONResponse(found.model_dump(exclude={"guard"} if found.guard is None else None), 200 if service.ready else 503)

    async def metrics() -> Response:
        """Counts and histograms for Prometheus."""
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for path, handler, answer in (
        ("/v1/models", models, Models),
        ("/v1/models/{name:path}", model, Model),
        ("/healthz", healthz, Health),
        ("/readyz", readyz, Health),
    ):
        app.add_api_route(
            path, handler, methods=["GET"], operation_id=handler.__name__, responses={200: {"model": answer}}, response_model=None
        )
    app.add_api_route("/metrics", metrics, methods=["GET"], operation_id="metrics", response_model=None, response_class=PlainTextResponse)


def _document(app: FastAPI, service: Service) -> None:
    """Completes the OpenAPI document: shapes of bodies, errors in one shape, the token."""
    plain = app.openapi

    def whole() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = plain()
        components = document.setdefault("components", {})
        shapes = components.setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            shapes.pop(name, None)
        for route in app.routes:
            shapes.update(getattr(getattr(route, "endpoint", None), "shapes", {}))
        error = ErrorAnswer.model_json_schema(ref_template="#/components/schemas/{model}")
        shapes.update({**error.pop("$defs", {}), "ErrorAnswer": error})
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                for status in ERRORS if path not in OPEN else ():
                    operation["responses"].setdefault(str(status), {"description": "An error.", "content": content})
        for path, text in (("/readyz", "Not ready."), ("/healthz", "The engine failed.")):
            document["paths"][path]["get"]["responses"]["503"] = {"description": text}
        if service.settings.token is not None:
            components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"token": []}]
        app.openapi_schema = document
        return document

    app.openapi = whole  # type: ignore[method-assign]
