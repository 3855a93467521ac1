"""guard serve: a guard behind an OpenAI-compatible endpoint, alone or in front of another server."""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from safety_neurons.cli import console
from safety_neurons.cli.options import Common, Model
from safety_neurons.cli.session import Session, resolve
from safety_neurons.cli.verb import verb
from safety_neurons.errors import UsageError

RATES = ("caught", "false_positives")
LISTENING, GUARDING, LIMITS = "Where it listens", "What the guard does", "Limits"
INSTALL = "pip install 'safety-neurons[serve]'"
TOKEN_VARIABLE, UPSTREAM_KEY_VARIABLE = "SAFETY_NEURONS_TOKEN", "SAFETY_NEURONS_UPSTREAM_KEY"

GuardFolder = Annotated[str, typer.Option("--guard", help="Folder of the guard that guard fit wrote.", rich_help_panel="Models")]
UpstreamUrl = Annotated[
    str | None,
    typer.Option(help=f"OpenAI-compatible server that answers, up to /v1; its key in {UPSTREAM_KEY_VARIABLE}.", rich_help_panel="Models"),
]
Name = Annotated[str | None, typer.Option(help="What clients call the model. [default: its name]", rich_help_panel="Models")]
Host = Annotated[str, typer.Option(help=f"Others than this machine need the token in {TOKEN_VARIABLE}.", rich_help_panel=LISTENING)]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.", rich_help_panel=LISTENING)]
Docs = Annotated[bool, typer.Option("--docs", help="Pages at /docs, whose scripts come from elsewhere.", rich_help_panel=LISTENING)]
Fpr = Annotated[float | None, typer.Option(help="Operating point: the false-positive rate it was chosen for.", rich_help_panel=GUARDING)]
Threshold = Annotated[float | None, typer.Option(help="A threshold of your own in its place.", rich_help_panel=GUARDING)]
Force = Annotated[bool, typer.Option("--force", help="Serve a guard that may stop nothing.", rich_help_panel=GUARDING)]
OnUnsafe = Annotated[str, typer.Option(help="refuse with a text, or answer with an error.", rich_help_panel=GUARDING)]
RefusalText = Annotated[str | None, typer.Option(help="Text of the refusal.", rich_help_panel=GUARDING)]
FailOpen = Annotated[bool, typer.Option("--fail-open", help="Let through what the guard could not judge.", rich_help_panel=GUARDING)]
Shadow = Annotated[bool, typer.Option("--shadow", help="Judge, count and log; never hold back.", rich_help_panel=GUARDING)]
LogPrompts = Annotated[bool, typer.Option("--log-prompts", help="Put prompts into the log.", rich_help_panel=GUARDING)]
PassField = Annotated[
    list[str] | None, typer.Option(help="Chat field to hand to the upstream unread; may be repeated.", rich_help_panel=GUARDING)
]
MaxBody = Annotated[int, typer.Option(min=1, help="Bytes of a request.", rich_help_panel=LIMITS)]
MaxMessages = Annotated[int, typer.Option(min=1, help="Turns of a conversation.", rich_help_panel=LIMITS)]
MaxInputs = Annotated[int, typer.Option(min=1, help="Texts of one request.", rich_help_panel=LIMITS)]
MaxPromptTokens = Annotated[int | None, typer.Option(min=1, help="Tokens of a prompt. [default: the context]", rich_help_panel=LIMITS)]
MaxCharacters = Annotated[
    int | None, typer.Option(min=1, help="Characters of a prompt, refused untokenised. [default: 16 a token]", rich_help_panel=LIMITS)
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens of an answer of the local model.", rich_help_panel=LIMITS)]
MaxRequests = Annotated[int, typer.Option(min=1, help="Requests under way; more get 429.", rich_help_panel=LIMITS)]
Queue = Annotated[int, typer.Option(min=1, help="Prompts that may wait for the model; more get 429.", rich_help_panel=LIMITS)]
QueueBytes = Annotated[int, typer.Option(min=1, help="Bytes of all requests under way; more get 429.", rich_help_panel=LIMITS)]
MaxBatch = Annotated[int, typer.Option(min=1, help="Prompts judged together.", rich_help_panel=LIMITS)]
Timeout = Annotated[float, typer.Option(help="Seconds for a verdict; later is not safe.", rich_help_panel=LIMITS)]
UpstreamTimeout = Annotated[float, typer.Option(help="Seconds of silence of the upstream.", rich_help_panel=LIMITS)]
MaxConnections = Annotated[
    int | None, typer.Option(min=1, help="Connections. [default: what the limit of descriptors has room for]", rich_help_panel=LIMITS)
]
HeaderTimeout = Annotated[float, typer.Option(help="Seconds for a request's head to arrive.", rich_help_panel=LIMITS)]
BodyTimeout = Annotated[float, typer.Option(help="Seconds for a body to arrive.", rich_help_panel=LIMITS)]
IdleTimeout = Annotated[float, typer.Option(help="Seconds between two requests of a connection.", rich_help_panel=LIMITS)]


def register(app: typer.Typer) -> None:
    """Add the verb to a group."""
    verb(app, "serve")(serve)


def serve(
    common: Common,
    model: Model,
    guard: GuardFolder,
    upstream: UpstreamUrl = None,
    served_name: Name = None,
    host: Host = "127.0.0.1",
    port: Port = 8600,
    docs: Docs = False,
    fpr: Fpr = None,
    threshold: Threshold = None,
    force: Force = False,
    on_unsafe: OnUnsafe = "refuse",
    refusal: RefusalText = None,
    fail_open: FailOpen = False,
    shadow: Shadow = False,
    log_prompts: LogPrompts = False,
    pass_field: PassField = None,
    max_body: MaxBody = 1 << 20,
    max_messages: MaxMessages = 256,
    max_inputs: MaxInputs = 64,
    max_prompt_tokens: MaxPromptTokens = None,
    max_characters: MaxCharacters = None,
    max_new_tokens: MaxNewTokens = 1024,
    max_requests: MaxRequests = 512,
    queue: Queue = 256,
    queue_bytes: QueueBytes = 1 << 25,
    max_batch: MaxBatch = 32,
    timeout: Timeout = 30.0,
    upstream_timeout: UpstreamTimeout = 120.0,
    max_connections: MaxConnections = None,
    header_timeout: HeaderTimeout = 10.0,
    body_timeout: BodyTimeout = 10.0,
    idle_timeout: IdleTimeout = 75.0,
) -> None:
    """Serve a guard: chat completions behind it, moderations, and the routes LiteLLM and NeMo Guardrails ask."""
    options = {name: value for name, value in locals().items() if name != "common"}
    if fpr is not None and threshold is not None:
        raise UsageError("--fpr and --threshold: expected one of them")
    session = Session("guard-serve", common, options)
    settings = configured(options, model)
    with listening(settings) as sock:
        from safety_neurons.guard import Guard
        from safety_neurons.guard.server import serve_guard
        from safety_neurons.guard.server.serving import address, run

        found = Guard.load(guard)
        found = found.at(fpr) if fpr is not None else found.with_threshold(threshold) if threshold is not None else found
        if found.why_idle is not None and not force:
            raise UsageError(f"{found.why_idle}; recalibrate it on more prompts, give a lower --threshold, or serve it with --force")
        bound = found.bind(session.model(resolve(model)))
        log = lines(as_json=common.json, debug=common.debug)
        service = serve_guard(bound, settings, log)
        where = address(sock)
        run(service, sock, lambda: tell_json(bound, settings, where) if common.json else say(banner(bound, settings, where)))
    counts = service.engine.counts
    if common.json:
        log({"event": "ended", "judged": counts.judged, "batches": counts.batches, "answered": counts.answered})
    else:
        say([f"ended: {counts.judged:,} prompts judged in {counts.batches:,} batches, {counts.answered:,} in the prefill of their answers"])


def configured(options: Mapping[str, Any], model: str) -> Any:
    """The settings that the options mean, secrets from the environment.

    Raises:
        UsageError: the extra is missing, or the options contradict one another.
    """
    try:
        from safety_neurons.guard.server.settings import REFUSAL, Limits, Settings
    except ModuleNotFoundError as error:
        raise UsageError(f"guard serve needs {error.name}, which is not installed; run {INSTALL}") from None
    limits = Limits(
        body_bytes=options["max_body"],
        messages=options["max_messages"],
        inputs=options["max_inputs"],
        prompt_tokens=options["max_prompt_tokens"],
        new_tokens=options["max_new_tokens"],
        requests=options["max_requests"],
        waiting=options["queue"],
        batch=options["max_batch"],
        seconds=options["timeout"],
        upstream_seconds=options["upstream_timeout"],
        characters=options["max_characters"],
        bytes_under_way=options["queue_bytes"],
        connections=options["max_connections"],
        header_seconds=options["header_timeout"],
        body_seconds=options["body_timeout"],
        idle_seconds=options["idle_timeout"],
    )
    same = ("host", "port", "upstream", "on_unsafe", "fail_open", "shadow", "log_prompts", "docs")
    return Settings(
        name=options["served_name"] or short_name(model),
        token=os.environ.get(TOKEN_VARIABLE) or None,
        upstream_key=os.environ.get(UPSTREAM_KEY_VARIABLE) or None,
        refusal=REFUSAL if options["refusal"] is None else options["refusal"],
        passed=tuple(options["pass_field"] or ()),
        limits=limits,
        **{name: options[name] for name in same},
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
    caught, wrong = (console.interval(standing[name], 3) if standing[name] else "nobody knows what share" for name in RATES)
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
