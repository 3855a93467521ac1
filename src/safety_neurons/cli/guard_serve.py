"""guard serve: a guard behind an OpenAI-compatible endpoint, alone or in front of another server."""

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

from safety_neurons.cli import console
from safety_neurons.cli.options import OneModel
from safety_neurons.cli.session import Session, resolve
from safety_neurons.cli.verb import verb
from safety_neurons.declarations import Between, Declaration, Positive
from safety_neurons.errors import UsageError

RATES = ("caught", "false_positives")
INSTALL = "pip install 'safety-neurons[serve]'"
TOKEN_VARIABLE, UPSTREAM_KEY_VARIABLE = "SAFETY_NEURONS_TOKEN", "SAFETY_NEURONS_UPSTREAM_KEY"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Behind(OneModel):
    """The guard, and who answers behind it."""

    PANEL: ClassVar[str | None] = "Models"

    guard: str
    """Folder of the guard that guard fit wrote."""
    upstream: str | None = None
    """OpenAI-compatible server that answers, up to /v1; its key in SAFETY_NEURONS_UPSTREAM_KEY."""
    served_name: str | None = None
    """What clients call the model. [default: its name]"""


@dataclasses.dataclass(frozen=True)
class Listening(Declaration):
    """Where it listens."""

    PANEL: ClassVar[str | None] = "Where it listens"

    host: str = "127.0.0.1"
    """Others than this machine need the token in SAFETY_NEURONS_TOKEN."""
    port: Annotated[int, Between(0, 65535)] = 8600
    """0 takes any that is free."""
    docs: bool = False
    """Pages at /docs, whose scripts come from elsewhere."""


@dataclasses.dataclass(frozen=True)
class Guarding(Declaration):
    """What the guard does."""

    PANEL: ClassVar[str | None] = "What the guard does"

    fpr: float | None = None
    """Operating point: the false-positive rate it was chosen for."""
    threshold: float | None = None
    """A threshold of your own in its place."""
    force: bool = False
    """Serve a guard that may stop nothing."""
    on_unsafe: str = "refuse"
    """refuse with a text, or answer with an error."""
    refusal: str | None = None
    """Text of the refusal."""
    fail_open: bool = False
    """Let through what the guard could not judge."""
    shadow: bool = False
    """Judge, count and log; never hold back."""
    log_prompts: bool = False
    """Put prompts into the log."""
    pass_field: list[str] | None = None
    """Chat field to hand to the upstream unread; may be repeated."""

    def check(self) -> None:
        """Also that there is one threshold."""
        super().check()
        if self.fpr is not None and self.threshold is not None:
            raise UsageError("--fpr and --threshold: expected one of them")


@dataclasses.dataclass(frozen=True)
class Limited(Declaration):
    """How much is taken."""

    PANEL: ClassVar[str | None] = "Limits"

    max_body: Positive = 1 << 20
    """Bytes of a request."""
    max_messages: Positive = 256
    """Turns of a conversation."""
    max_inputs: Positive = 64
    """Texts of one request."""
    max_prompt_tokens: Positive | None = None
    """Tokens of a prompt. [default: the context]"""
    max_characters: Positive | None = None
    """Characters of a prompt, refused untokenised. [default: 16 a token]"""
    max_new_tokens: Positive = 1024
    """Tokens of an answer of the local model."""
    max_requests: Positive = 512
    """Requests under way; more get 429."""
    queue: Positive = 256
    """Prompts that may wait for the model; more get 429."""
    queue_bytes: Positive = 1 << 25
    """Bytes of all requests under way; more get 429."""
    max_batch: Positive = 32
    """Prompts judged together."""
    timeout: float = 30.0
    """Seconds for a verdict; later is not safe."""
    upstream_timeout: float = 120.0
    """Seconds of silence of the upstream."""
    max_connections: Positive | None = None
    """Connections. [default: what the limit of descriptors has room for]"""
    header_timeout: float = 10.0
    """Seconds for a request's head to arrive."""
    body_timeout: float = 10.0
    """Seconds for a body to arrive."""
    idle_timeout: float = 75.0
    """Seconds between two requests of a connection."""


LIMITS = {
    "max_body": "body_bytes",
    "max_messages": "messages",
    "max_inputs": "inputs",
    "max_prompt_tokens": "prompt_tokens",
    "max_characters": "characters",
    "max_new_tokens": "new_tokens",
    "max_requests": "requests",
    "queue": "waiting",
    "queue_bytes": "bytes_under_way",
    "max_batch": "batch",
    "timeout": "seconds",
    "upstream_timeout": "upstream_seconds",
    "max_connections": "connections",
    "header_timeout": "header_seconds",
    "body_timeout": "body_seconds",
    "idle_timeout": "idle_seconds",
}
"""For every limit what the server calls it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served(Limited, Guarding, Listening, Behind):
    """Everything that decides how a guard is served; the last base has the first options."""


@verb("guard serve")
def serve(session: Session, served: Served) -> None:
    """Serve a guard: chat completions behind it, moderations, and the routes LiteLLM and NeMo Guardrails ask."""
    common, settings = session.common, configured(served)
    with listening(settings) as sock:
        from safety_neurons.guard import Guard
        from safety_neurons.guard.server import serve_guard
        from safety_neurons.guard.server.serving import address, run

        guard = Guard.load(served.guard)
        if served.fpr is not None:
            guard = guard.at(served.fpr)
        elif served.threshold is not None:
            guard = guard.with_threshold(served.threshold)
        if guard.why_idle is not None and not served.force:
            raise UsageError(f"{guard.why_idle}; recalibrate it on more prompts, give a lower --threshold, or serve it with --force")
        bound = guard.bind(session.model(resolve(served.model)))
        log = lines(as_json=common.json, debug=common.debug)
        service = serve_guard(bound, settings, log)
        where = address(sock)
        run(service, sock, lambda: tell_json(bound, settings, where) if common.json else say(banner(bound, settings, where)))
    counts = service.engine.counts
    if common.json:
        log({"event": "ended", "judged": counts.judged, "batches": counts.batches, "answered": counts.answered})
    else:
        say([f"ended: {counts.judged:,} prompts judged in {counts.batches:,} batches, {counts.answered:,} in the prefill of their answers"])


def configured(served: Served) -> Any:
    """The settings that the options mean, secrets from the environment.

    Raises:
        UsageError: the extra is missing, or the options contradict one another.
    """
    try:
        from safety_neurons.guard.server.door import REFUSAL, Limits, Settings
    except ModuleNotFoundError as error:
        raise UsageError(f"guard serve needs {error.name}, which is not installed; run {INSTALL}") from None
    same = ("host", "port", "upstream", "on_unsafe", "fail_open", "shadow", "log_prompts", "docs")
    return Settings(
        name=served.served_name or short_name(served.model),
        token=os.environ.get(TOKEN_VARIABLE) or None,
        upstream_key=os.environ.get(UPSTREAM_KEY_VARIABLE) or None,
        refusal=REFUSAL if served.refusal is None else served.refusal,
        passed=tuple(served.pass_field or ()),
        limits=Limits(**{limit: getattr(served, option) for option, limit in LIMITS.items()}),
        **{name: getattr(served, name) for name in same},
    )


def short_name(model: str) -> str:
    """What clients call a model: of a folder its last name, so that no path of this machine is told to them."""
    if model.startswith("organism:"):
        return model.removeprefix("organism:")
    first, *adapters = model.split("+")
    parts = [pathlib.PurePath(part).name if os.path.exists(part) else part for part in (first, *adapters)]
    return "+".join(parts)


@contextlib.contextmanager
def listening(settings: Any) -> Any:
    """The socket, bound before a model is loaded: an address that is taken is found at once."""
    from safety_neurons.guard.server.serving import bound

    with contextlib.closing(bound(settings.host, settings.port)) as sock:
        yield sock


def banner(guard: Any, settings: Any, where: str) -> list[str]:
    """What a person reads when the server is ready."""
    unsure = "is let through (--fail-open)" if settings.fail_open else "is not safe"
    flagged = (
        "is answered like any other (--shadow)"
        if settings.shadow
        else f"gets {'a refusal' if settings.on_unsafe == 'refuse' else 'an error'}"
    )
    who = "clients with the token" if settings.token else "this machine only, without a token"
    standing = guard.standing
    from safety_neurons.display.guards import interval
    from safety_neurons.display.parts import plain

    caught, wrong = (plain(interval(standing[name])) if standing[name] else "nobody knows what share" for name in RATES)
    return [
        f"guard      {len(guard.neurons):,} neurons, threshold {guard.threshold:.4g} ({guard.in_force})",
        f"catches    {caught} of the unsafe requests it was calibrated on, and {wrong} of the safe ones",
        *([f"beware     {guard.why_idle}"] if guard.why_idle else []),
        f"answers    {settings.upstream or f'the model itself, as {settings.name}'}",
        f"flagged    {flagged}; what the guard cannot judge {unsure}",
        f"open to    {who}",
        f"listening  {where}",
    ]


def tell_json(guard: Any, settings: Any, where: str) -> None:
    """The one object on standard output, as soon as requests are taken: a program that chose port 0 reads there which one it is."""
    said = {
        "url": where,
        "host": settings.host,
        "port": int(where.rpartition(":")[2]),
        "model": settings.name,
        "upstream": settings.upstream,
        "threshold": guard.threshold,
        "token": settings.token is not None,
        "pid": os.getpid(),
    }
    stream = console.streams().out
    stream.write(console.json_line(said))
    stream.flush()


def say(rows: list[str]) -> None:
    """Lines on standard error."""
    console.tell("".join(f"{console.line_of(row) if not row.isprintable() else row}\n" for row in rows))


def lines(*, as_json: bool, debug: bool) -> Callable[[Mapping[str, Any]], None]:
    """What writes the log: one line a request on standard error, as words or as JSON."""

    def write(event: Mapping[str, Any]) -> None:
        error = event.get("error")
        if debug and isinstance(error, BaseException):
            import traceback

            traceback.print_exception(error, file=console.streams().err)
        if error is not None:
            event = {**event, "error": type(error).__name__}
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S")
        say([json.dumps({"time": stamp, **event}, default=str) if as_json else f"{stamp}  {line(event)}"])

    return write


def line(event: Mapping[str, Any]) -> str:
    """An event in words. Nothing that a client wrote is in it, unless prompts are logged: then as a JSON string."""
    if event["event"] == "request":
        parts = [f"{event['method']:<4} {event['route']:<33} {event['status']}", f"{event['ms']:>8.1f} ms"]
    else:
        parts = [str(event[name]) for name in ("event", "error") if name in event]
    if "guard_ms" in event:
        parts.append(f"guard {event['guard_ms']:.1f} ms")
    if "of" in event:
        parts.append(f"flagged {event['flagged']}/{event['of']}")
    parts += [f"p {event['p_unsafe']:.3f}"] if "p_unsafe" in event else []
    parts += [str(event[name]) for name in ("guard", "code", "exception") if name in event]
    parts.append(event["id"])
    if "prompt" in event:
        parts.append(json.dumps(event["prompt"]))
    return "  ".join(parts)
