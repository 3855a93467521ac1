"""What guard serve says: the banner, the one JSON line, and a log of one line a request."""

import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from safety_neurons.cli import console
from safety_neurons.counting import numbered

RATES = ("caught", "false_positives")


def banner(guard: Any, settings: Any, where: str) -> list[str]:
    """What a person reads when the server is ready.

    Args:
        guard: bound.
        settings: of the service, which may take less than it was asked to: re-checks bound the answers.
        where: its address.
    """
    flagged = (
        f"gets {'a refusal' if settings.on_unsafe == 'refuse' else 'an error'}; what the guard cannot judge "
    )
    flagged += "is let through (--fail-open)" if settings.fail_open else "is not safe"
    if settings.shadow:
        flagged = "is answered like any other, and so is what the guard cannot judge (--shadow)"
    answers = settings.upstream or (
        f"the model itself, as {settings.name}, in up to {numbered(settings.limits.new_tokens, 'token')}"
    )
    if settings.recheck_every:
        answers += f", checked every {settings.recheck_every}"
    who = "clients with the token" if settings.token else "this machine only, without a token"
    standing = guard.standing
    from safety_neurons.display.guards import interval
    from safety_neurons.display.parts import plain

    caught, wrong = (
        plain(interval(standing[name])) if standing[name] else "nobody knows what share" for name in RATES
    )
    return [
        f"guard      {numbered(len(guard.neurons), 'neuron')}, threshold {guard.threshold:.4g} "
        f"({guard.in_force})",
        f"catches    {caught} of the unsafe requests it was calibrated on, and {wrong} of the safe ones",
        *([f"beware     {guard.why_idle}"] if guard.why_idle else []),
        f"answers    {answers}",
        f"flagged    {flagged}",
        f"open to    {who}",
        f"listening  {where}",
    ]


def tell_json(guard: Any, settings: Any, where: str) -> None:
    """The one object on standard output, as soon as requests are taken: a program that chose port 0 reads
    there which one it is.
    """
    line = {
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
    stream.write(console.json_line(line))
    stream.flush()


def say(rows: list[str]) -> None:
    """Lines on standard error."""
    console.tell("".join(f"{row if row.isprintable() else console.line_of(row)}\n" for row in rows))


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
    """An event in words. Nothing that a client wrote is in it, unless prompts are logged: then as a JSON
    string.
    """
    if event["event"] == "request":
        parts = [f"{event['method']:<4} {event['route']:<33} {event['status']}", f"{event['ms']:>8.1f} ms"]
    else:
        parts = [str(event[name]) for name in ("event", "error") if name in event]
    if "guard_ms" in event:
        parts.append(f"guard {event['guard_ms']:.1f} ms")
    if "of" in event:
        parts.append(f"flagged {event['flagged']}/{event['of']}")
    if "flagged_answers" in event:
        parts.append(f"flagged answers {event['flagged_answers']}")
    parts += [f"p {event['p_unsafe']:.3f}"] if "p_unsafe" in event else []
    parts += [str(event[name]) for name in ("guard", "code", "exception") if name in event]
    parts.append(event["id"])
    if "prompt" in event:
        parts.append(json.dumps(event["prompt"]))
    return "  ".join(parts)
