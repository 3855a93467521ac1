"""The application: an OpenAPI document that says what is understood, and its routes: chat completions,
verdicts for others, health.
"""

import contextlib
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import httpx
from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request

from safety_neurons import __version__
from safety_neurons.errors import UsageError
from safety_neurons.guard.features import RequestReading, readings
from safety_neurons.guard.guard import Guard
from safety_neurons.guard.server.answering import Answerer
from safety_neurons.guard.server.door import OPEN, Door, Log, Metrics, Settings, drifts_of
from safety_neurons.guard.server.engine import (
    Engine,
    Outcome,
    PromptJudge,
    VerdictGate,
    Writer,
    outcome_of,
)
from safety_neurons.guard.server.local import Bound, LocalWriter
from safety_neurons.guard.server.routes import ANSWERING, AnswerRoute
from safety_neurons.guard.server.shapes import (
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
    Part,
    Problem,
    Turn,
    conversation,
    parse,
    text_of,
    texts_in,
    unforeseen,
    validated,
)
from safety_neurons.guard.server.upstream import Upstream
from safety_neurons.guard.watching import Rules
from safety_neurons.model.batches import token_budget
from safety_neurons.prompt_lists import Prompt

_CHARACTERS_A_TOKEN = 16
"""Texts have about four characters a token, and what has four times as many throughout is no text: it is
refused unread.
"""

MODERATIONS, CLASSIFY, GUARDRAIL = "/v1/moderations", "/classify", "/beta/litellm_basic_guardrail_api"
REASONS = {
    "ok": "the guard expects an unsafe answer",
    "truncated": "the prompt is longer than the guard reads",
    "error": "the guard could not judge the prompt",
    "timeout": "the guard did not finish in time",
}
"""Why a prompt is held back, in words that say nothing about how nearly it was not."""
ANSWER_REASONS = {
    "ok": "the guard finds the answer unsafe",
    "truncated": "the answer is longer than the guard reads",
    "error": "the guard could not judge the answer",
    "timeout": "the guard did not finish in time",
}
"""The same of answers."""


class Verdicts:
    """Judges texts and conversations for others.

    Args:
        settings: Limits, and the name the guard answers as.
        gate: Judges.
        reads_answers: Whether answers can be judged too.
    """

    def __init__(self, settings: Settings, gate: VerdictGate, *, reads_answers: bool = False) -> None:
        self.settings, self.gate, self.reads_answers = settings, gate, reads_answers

    async def moderate(self, request: ModerationRequest, noted: dict[str, Any]) -> dict[str, Any]:
        """OpenAI's moderations: a string, a list of strings, the parts of a message, or the turns of a
        conversation.
        """
        outcomes = await self._judged(self._asked(request.input), MODERATIONS, noted)
        return {
            "id": f"modr-{secrets.token_hex(12)}",
            "model": self.settings.name,
            "results": [_moderation(outcome) for outcome in outcomes],
        }

    async def classify(self, request: ClassifyRequest, noted: dict[str, Any]) -> dict[str, Any]:
        """The shape of a classifier that vLLM serves."""
        outcomes = await self._judged(self._asked(request.input), CLASSIFY, noted)
        data = [_classification(number, outcome) for number, outcome in enumerate(outcomes)]
        return {
            "id": f"clsf-{secrets.token_hex(12)}",
            "object": "list",
            "created": int(time.time()),
            "model": self.settings.name,
            "data": data,
        }

    async def guardrail(self, request: GuardrailRequest, noted: dict[str, Any]) -> dict[str, Any]:
        """LiteLLM's generic guardrail: the conversation where it is given, else the texts.

        Tools by themselves.
        """
        if request.input_type == "response" and not self.reads_answers:
            raise Problem(
                400,
                "this guard reads prompts, not answers; expected mode pre_call or during_call, or a guard "
                "that was fit with --recheck-every",
                "unsupported_input_type",
                param="input_type",
            )
        if request.images:
            return self._unread("images are not read by the guard", noted)
        try:
            asked = self._answers(request) if request.input_type == "response" else self._requests(request)
        except Problem as problem:
            if problem.code != "unreadable_content":
                raise
            return self._unread(problem.message, noted)
        if not asked:  # what cannot be shown as text, token ids say, comes as nothing
            return self._unread("there is nothing that the guard can read", noted)
        reasons = ANSWER_REASONS if request.input_type == "response" else REASONS
        return self._decided(await self._judged(asked, GUARDRAIL, noted), reasons)

    def _requests(self, request: GuardrailRequest) -> list[list[RequestReading]]:
        """The readings of the conversation or the texts, and of tools and their calls."""
        asked = [readings(Prompt(str(number), text)) for number, text in enumerate(request.texts or ())]
        if request.structured_messages:
            whole = conversation(request.structured_messages, self.settings.limits.messages)
            read = {turn.content for way in whole for turn in way.prompt.turns}
            asked = [whole, *(ways for ways in asked if ways[0].prompt.text not in read)]
        for name, values in (("tools", request.tools), ("tool_calls", request.tool_calls)):
            asked += (
                [[RequestReading(name, Prompt(name, text)) for text in texts_in(values)]] if values else []
            )
        return asked

    def _answers(self, request: GuardrailRequest) -> list[list[RequestReading]]:
        """Answers of a model (mode `post_call`), each behind the conversation where that is given; calls of
        tools are answers too.
        """
        asked = Prompt("0", "")
        if request.structured_messages:
            asked = conversation(request.structured_messages, self.settings.limits.messages)[0].prompt
        texts = [*(request.texts or ()), *(texts_in(request.tool_calls) if request.tool_calls else ())]
        return [
            [RequestReading(f"answer {place}", dataclasses.replace(asked, answer=text))]
            for place, text in enumerate(texts, 1)
        ]

    def _decided(self, outcomes: Sequence[Outcome], reasons: Mapping[str, str]) -> dict[str, Any]:
        held = next((outcome for outcome in outcomes if outcome.held), None)
        if held is None:
            return {"action": "NONE", "blocked_reason": None}
        return {"action": "BLOCKED", "blocked_reason": reasons.get(held.status, reasons["error"])}

    def _unread(self, reason: str, noted: dict[str, Any]) -> dict[str, Any]:
        """What the guard cannot read is not safe, unless the server fails open or only watches."""
        noted["guard"] = "unreadable"
        self.gate.metrics.errors.labels("unreadable").inc()
        if self.settings.fail_open or self.settings.shadow:
            return {"action": "NONE", "blocked_reason": None}
        self.gate.metrics.blocked.labels(GUARDRAIL).inc()
        return {"action": "BLOCKED", "blocked_reason": reason}

    def _asked(self, given: str | Sequence[str | Part | Turn]) -> list[list[RequestReading]]:
        """The readings of each text, or of the one message or conversation, that an input holds."""
        if isinstance(given, str):
            return [readings(Prompt("0", given))]
        turns = [one for one in given if isinstance(one, Turn)]
        if turns:
            return [conversation(turns, self.settings.limits.messages)]
        parts = [
            text_of(part, f"input[{place}]") for place, part in enumerate(given) if isinstance(part, Part)
        ]
        if parts:
            alone = [
                RequestReading(f"part {place}", Prompt("0", text))
                for place, text in enumerate(parts, 1)
                if len(parts) > 1 and text.strip()
            ]
            return [[*readings(Prompt("0", "\n".join(parts))), *alone]]
        return [readings(Prompt(str(number), str(text))) for number, text in enumerate(given)]

    async def _judged(
        self, asked: Sequence[Sequence[RequestReading]], route: str, noted: dict[str, Any]
    ) -> list[Outcome]:
        if len(asked) > self.settings.limits.inputs:
            message = f"{len(asked)} texts; expected at most {self.settings.limits.inputs}"
            raise Problem(400, message, "too_many_inputs", param="texts" if route == GUARDRAIL else "input")
        if self.settings.log_prompts:
            noted["prompt"] = [_logged(ways[0].prompt) for ways in asked]
        return await self.gate.judge(asked, route, noted)


def _logged(prompt: Prompt) -> str | list[str]:
    """What was judged, as it stands in the log: a text, or the turns of a conversation with its answer."""
    if prompt.answer is None and not prompt.messages:
        return prompt.text
    turns = [turn.content for turn in prompt.turns if prompt.messages or turn.content]
    return turns if prompt.answer is None else [*turns, prompt.answer]


def _moderation(outcome: Outcome) -> dict[str, Any]:
    score = _probability(outcome)
    return {
        "flagged": outcome.held,
        "categories": {"unsafe": outcome.held},
        "category_scores": {"unsafe": score},
        "category_applied_input_types": {"unsafe": ["text"]},
        "guard": outcome.record,
    }


def _classification(number: int, outcome: Outcome) -> dict[str, Any]:
    score = _probability(outcome)
    label = "unsafe" if outcome.held else "safe"
    return {
        "index": number,
        "label": label,
        "probs": [1.0 - score, score],
        "num_classes": 2,
        "guard": outcome.record,
    }


def _probability(outcome: Outcome) -> float:
    """A probability for places that must have one: certainty of what is done where the guard could not
    judge.
    """
    return outcome.p_unsafe if outcome.p_unsafe is not None else float(outcome.held)


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
        judge: PromptJudge,
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
        self.gate = VerdictGate(
            self.engine, settings, metrics, reads_ends=getattr(judge, "reads_ends", False)
        )
        self.upstream = None if settings.upstream is None else Upstream(settings, metrics, transport)
        self.answerer = Answerer(settings, self.gate, self.upstream, log)
        self.verdicts = Verdicts(settings, self.gate, reads_answers=getattr(judge, "reads_answers", False))
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


def serve_guard(guard: Guard, settings: Settings, log: Log = lambda _: None, **further: Any) -> Service:
    """A service around a guard that is bound to its model.

    Args:
        guard: Bound.
        settings: How the service behaves.
        log: Told one event a request.
        **further: As `Service` takes them.

    Raises:
        UsageError: re-checks that the guard has no classifier for, or of an upstream's answers.
    """
    metrics = Metrics(drifts_of(guard.reference))
    limits = settings.limits
    tokens = min((most for most in (limits.prompt_tokens, guard.bound.max_length) if most), default=None)
    if limits.characters is None and tokens is not None:
        limits = dataclasses.replace(limits, characters=_CHARACTERS_A_TOKEN * tokens)
        settings = dataclasses.replace(settings, limits=limits)
    every = settings.recheck_every
    if every and settings.upstream is not None:
        raise UsageError(
            f"re-checks every {every} tokens with an upstream: its answers are not re-checked as they come; "
            "leave one of them out, or have whole answers judged (LiteLLM's post_call)"
        )
    if every and guard.answers is None:
        raise UsageError(
            f"re-checks every {every} tokens: the guard has no classifier for answers; fit one "
            "(guard fit --recheck-every)"
        )
    if every and guard.recheck is not None:  # the rate of false positives is known up to this length
        limits = dataclasses.replace(limits, new_tokens=min(limits.new_tokens, guard.recheck.max_new_tokens))
        settings = dataclasses.replace(settings, limits=limits)
    budget = limits.batch_tokens or token_budget(guard.bound.device)
    bound = Bound(guard, limits.prompt_tokens)
    rules = Rules(top=0, recheck_every=every, shadow=settings.shadow, fail_open=settings.fail_open)
    writer = LocalWriter(
        guard, lambda verdict: outcome_of(verdict, settings).held, rules=rules, batch_tokens=budget
    )
    return Service(
        settings, bound, metrics, writer, log=log, batch_tokens=budget, standing=guard.standing, **further
    )


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
    app.state.rejected = service.metrics.rejected
    app.add_exception_handler(Problem, _shown)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _not_served)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _unforeseen)
    _add_posts(app, service)
    _add_gets(app, service)
    _document(app, service)
    return app


async def _shown(request: Request, problem: Problem) -> Response:
    request.scope["noted"]["code"] = problem.code
    request.app.state.rejected.labels(problem.code).inc()
    return JSONResponse(problem.record, problem.status, problem.headers)


async def _not_served(request: Request, error: HTTPException) -> Response:
    code = _NAMES.get(error.status_code, "http_error")
    headers = dict(error.headers or {})
    if "Allow" in headers:
        taken = {method.strip() for method in headers["Allow"].split(",")}
        headers["Allow"] = ", ".join(sorted(taken | {"OPTIONS"} | ({"HEAD"} if "GET" in taken else set())))
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=headers)
    problem = Problem(
        error.status_code,
        f"there is no {request.method[:16]} here; see /openapi.json for the routes",
        code,
        headers=headers,
    )
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

    def answering_route(route: AnswerRoute) -> Any:
        async def answer(request: Request) -> Response:
            checked, body = await read(request, route.shape)
            scope = request.scope
            return await service.answerer.answer(route, checked, body, scope["noted"], scope["request_id"])

        answer.__doc__ = (
            f"Answers {route.about} unless the guard flags it: then a refusal that says `content_filter`."
        )
        return answer

    def judging_route(
        shape: type[BaseModel], judge: Callable[[Any, dict[str, Any]], Awaitable[Mapping[str, Any]]]
    ) -> Any:
        async def route(request: Request) -> Response:
            checked, _ = await read(request, shape)
            return JSONResponse(dict(await judge(checked, request.scope["noted"])))

        route.__doc__ = judge.__doc__
        return route

    verdicts = service.verdicts
    for one in ANSWERING:
        _post(app, one.path, one.name, answering_route(one), one.shape, None)
    for path, name, shape, judge, answer in (
        (MODERATIONS, "moderations", ModerationRequest, verdicts.moderate, ModerationAnswer),
        (CLASSIFY, "classify", ClassifyRequest, verdicts.classify, ClassifyAnswer),
        (GUARDRAIL, "guardrail", GuardrailRequest, verdicts.guardrail, GuardrailAnswer),
    ):
        _post(app, path, name, judging_route(shape, judge), shape, answer)


def _post(
    app: FastAPI, path: str, name: str, handler: Any, shape: type[BaseModel], answer: type[BaseModel] | None
) -> None:
    # The body is read by hand, so its shape is told to the document by hand.
    schema = shape.model_json_schema(ref_template="#/components/schemas/{model}")
    body = {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{shape.__name__}"}}},
    }
    handler.shapes = {**schema.pop("$defs", {}), shape.__name__: schema}
    responses: dict[int | str, Any] = {
        200: {"model": answer} if answer else {"description": "An answer, whole or as server-sent events."}
    }
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
    local = Model(
        id=service.settings.name, object="model", created=service.created, owned_by="safety-neurons"
    )

    async def models() -> Response:
        """The models that can be asked."""
        if service.upstream is None:
            return JSONResponse(Models(object="list", data=[local]).model_dump())
        status, headers, content = await service.upstream.models()
        return Response(content, status, headers, media_type="application/json")

    async def model(name: str) -> Response:
        """One of the models that can be asked."""
        if service.upstream is not None or name != local.id:
            raise Problem(
                404,
                "there is no model of this name here; expected one of GET /v1/models",
                "model_not_found",
                param="model",
            )
        return JSONResponse(local.model_dump())

    async def healthz() -> Response:
        """Whether the process is there and can go on: 503 once the engine has failed."""
        failed = service.engine.failed is not None
        return JSONResponse(
            Health(status="failed" if failed else "ok").model_dump(exclude_none=True), 503 if failed else 200
        )

    async def readyz() -> Response:
        """Whether requests are taken: 503 while the server starts or closes."""
        found = Health(status="ready" if service.ready else "not ready", guard=service.standing)
        return JSONResponse(
            found.model_dump(exclude={"guard"} if found.guard is None else None),
            200 if service.ready else 503,
        )

    async def metrics() -> Response:
        """Counts and histograms for Prometheus."""
        return PlainTextResponse(
            service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    for path, handler, answer in (
        ("/v1/models", models, Models),
        ("/v1/models/{name:path}", model, Model),
        ("/healthz", healthz, Health),
        ("/readyz", readyz, Health),
    ):
        app.add_api_route(
            path,
            handler,
            methods=["GET"],
            operation_id=handler.__name__,
            responses={200: {"model": answer}},
            response_model=None,
        )
    app.add_api_route(
        "/metrics",
        metrics,
        methods=["GET"],
        operation_id="metrics",
        response_model=None,
        response_class=PlainTextResponse,
    )


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
                    operation["responses"].setdefault(
                        str(status), {"description": "An error.", "content": content}
                    )
        for path, text in (("/readyz", "Not ready."), ("/healthz", "The engine failed.")):
            document["paths"][path]["get"]["responses"]["503"] = {"description": text}
        if service.settings.token is not None:
            components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"token": []}]
        app.openapi_schema = document
        return document

    app.openapi = whole  # type: ignore[method-assign]
