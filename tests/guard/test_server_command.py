"""The command's own words: settings from options and the environment, errors in a line, a log that reads
well.
"""

import contextlib
import dataclasses
import json
import sys

import pytest

from safety_neurons.cli import guard as guard_serve
from safety_neurons.cli import served as served_log
from safety_neurons.cli.session import Common, Session
from safety_neurons.errors import RunError, UsageError
from safety_neurons.guard import OperatingPoint
from safety_neurons.guard.server.serving import address, bound
from safety_neurons.results import rate

LIMITS = {
    **{
        "max_body": 1000,
        "max_messages": 2,
        "max_inputs": 3,
        "max_new_tokens": 4,
        "max_requests": 5,
        "queue": 6,
        "max_batch": 7,
    },
    **{
        "timeout": 8.0,
        "upstream_timeout": 9.0,
        "max_characters": 10,
        "queue_bytes": 11,
        "max_connections": 12,
    },
    **{"header_timeout": 13.0, "body_timeout": 14.0, "idle_timeout": 15.0},
}


def served(model="m", guard="g", **changes):
    return guard_serve.Served(model=model, guard=guard, port=0, **LIMITS, **changes)


def serve(**changes):
    options = served(**changes)
    options.check()
    guard_serve.serve(Session("guard-serve", Common(json=True), [options]), options)


@pytest.fixture(autouse=True)
def no_secrets(monkeypatch):
    for name in (guard_serve.TOKEN_VARIABLE, guard_serve.UPSTREAM_KEY_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def test_options_become_limits_and_secrets_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("SAFETY_NEURONS_TOKEN", "sixteen characters and more")
    settings = guard_serve.configured(served("organism:natural/base", host="0.0.0.0", refusal="No."))
    assert settings.name == "natural/base"
    assert settings.refusal == "No."
    assert settings.token == "sixteen characters and more"
    limits = settings.limits
    assert (limits.body_bytes, limits.messages, limits.inputs, limits.new_tokens, limits.requests) == (
        1000,
        2,
        3,
        4,
        5,
    )
    assert (limits.waiting, limits.batch, limits.seconds, limits.upstream_seconds) == (6, 7, 8.0, 9.0)
    assert (limits.characters, limits.bytes_under_way, limits.connections) == (10, 11, 12)
    assert (limits.header_seconds, limits.body_seconds, limits.idle_seconds) == (13.0, 14.0, 15.0)


def test_others_may_not_reach_a_server_without_a_token():
    with pytest.raises(UsageError, match="SAFETY_NEURONS_TOKEN"):
        guard_serve.configured(served(host="0.0.0.0"))


def test_a_missing_extra_is_one_line_that_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "safety_neurons.guard.server.door", None)
    with pytest.raises(UsageError, match=r"pip install 'safety-neurons\[serve\]'"):
        guard_serve.configured(served())


def test_no_path_of_this_machine_becomes_the_models_name(tmp_path):
    (tmp_path / "my-model").mkdir()
    assert guard_serve.short_name(str(tmp_path / "my-model")) == "my-model"
    assert guard_serve.short_name(f"{tmp_path / 'my-model'}+org/adapter") == "my-model+org/adapter"
    assert guard_serve.short_name("org/model@main") == "org/model@main"


def test_an_address_that_is_taken_is_an_error_in_a_line():
    with contextlib.closing(bound("127.0.0.1", 0)) as sock:
        sock.listen()
        port = int(address(sock).rpartition(":")[2])
        with pytest.raises(RunError, match=f"cannot listen on 127.0.0.1 port {port}"):
            bound("127.0.0.1", port)


@pytest.mark.parametrize("old", [False, True])
def test_a_guard_that_stops_nothing_is_not_served_unless_told_to(tmp_path, monkeypatch, old):
    from guarded import tiny_guard, tiny_model

    model = tiny_model()
    chances = {"safe": [0.1] * 24, "unsafe": [0.2] * 24}
    few = OperatingPoint(0.01, None, rate([0] * 24), rate([0] * 24), False, "few")
    idle = dataclasses.replace(
        tiny_guard(model), threshold=0.973, in_force="provisional fpr 0.01", operating_points=(few,)
    )
    dataclasses.replace(idle, reference={} if old else {"probabilities": chances}).save(tmp_path)
    options = {"model": "nowhere", "guard": str(tmp_path)}
    with pytest.raises(UsageError, match=r"caught 0 of 24 unsafe requests .*force"):
        serve(**options)
    with pytest.raises(Exception, match="nowhere"):  # went on to the model
        serve(**options, force=True)
    with pytest.raises(Exception, match="nowhere"):
        serve(**options, threshold=0.15)


def test_two_thresholds_are_one_too_many():
    with pytest.raises(UsageError, match="fpr and threshold"):
        serve(fpr=0.01, threshold=0.5)


def test_the_log_is_a_line_of_words_or_of_json_and_breaks_at_nothing_a_client_wrote(capsys):
    event = {
        "event": "request",
        "id": "req-1",
        "method": "POST",
        "route": "/classify",
        "status": 200,
        "ms": 3.14,
        "guard_ms": 2.0,
    }
    event |= {"flagged": 1, "of": 2, "p_unsafe": 0.97, "prompt": ["line\n2026 forged line\u2028"]}
    served_log.lines(as_json=False, debug=False)(event)
    served_log.lines(as_json=True, debug=False)(event)
    served_log.lines(as_json=False, debug=False)(
        {"event": "exception", "id": "req-2", "error": ValueError("secret words")}
    )
    words, as_json, failed = capsys.readouterr().err.splitlines()
    assert "POST /classify" in words
    assert "flagged 1/2" in words
    assert "p 0.970" in words
    assert json.loads(as_json)["p_unsafe"] == 0.97
    assert "ValueError" in failed
    assert "secret" not in failed


def test_the_banner_says_what_is_risky():
    class Tiny:
        neurons = range(200)
        threshold = 0.5
        in_force = "fpr 0.01"
        standing = {
            "caught": {"value": 0.5, "low": 0.3, "high": 0.7, "n": 24, "unscored": 0},
            "false_positives": None,
        }
        why_idle = None

    shy = guard_serve.configured(served())
    bold = guard_serve.configured(served(fail_open=True, shadow=True, upstream="http://localhost:1/v1"))
    assert "what the guard cannot judge is not safe" in " ".join(guard_serve.banner(Tiny(), shy, "http://x"))
    assert "catches    0.500 [0.300, 0.700] of the unsafe requests" in "\n".join(
        guard_serve.banner(Tiny(), shy, "http://x")
    )
    said = " ".join(guard_serve.banner(Tiny(), bold, "http://x"))
    assert "--shadow" in said
    assert "is not safe" not in said
    assert "http://localhost:1/v1" in said
    open_ = guard_serve.configured(served(fail_open=True, recheck_every=4))
    said = " ".join(guard_serve.banner(Tiny(), open_, "http://x"))
    assert "--fail-open" in said
    assert f"as m, in up to {open_.limits.new_tokens:,} tokens, checked every 4 " in said
