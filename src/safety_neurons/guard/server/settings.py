"""What a server is run with: where it listens, whom it lets in, how much it takes, what it does with a flagged request."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from safety_neurons.errors import UsageError
from safety_neurons.guard.generate import REFUSAL
from safety_neurons.model.chat_server import is_local

TOKEN_VARIABLE = "SAFETY_NEURONS_TOKEN"
UPSTREAM_KEY_VARIABLE = "SAFETY_NEURONS_UPSTREAM_KEY"
_SHORTEST_TOKEN = 16


@dataclass(frozen=True)
class Limits:
    """How much one request, and all requests together, may ask for.

    Attributes:
        body_bytes: Of one request.
        depth: Of nested lists and objects in a body.
        messages: Turns of a conversation.
        inputs: Texts that one request may have judged.
        prompt_tokens: Of one conversation or text; None for what fits the guard's model.
        characters: Of one conversation or text; None for 16 a token that it may have. What is longer is refused before it is tokenised.
        bytes_under_way: Of the bodies of all requests that are not yet answered; what would make them more gets 429.
        new_tokens: Of one answer of the local model.
        requests: Accepted and not yet answered; the next one gets 429.
        waiting: Conversations and texts that wait for the model; a request that would make them more gets 429.
        batch: Conversations judged, or answered, together.
        batch_tokens: Padded tokens of a forward pass; None for what suits the device.
        seconds: Longest wait for a verdict; what takes longer is not safe.
        body_seconds: Longest time for a body to arrive.
        header_seconds: Longest time for a request's head to arrive, from the connection's first moment or the head's first byte.
        idle_seconds: Longest time between two requests of a connection.
        write_seconds: Longest time in which a client reads nothing of an answer.
        connections: At the same time; None for what the process's limit of descriptors leaves room for.
        upstream_seconds: Longest silence of the upstream.
        drain_seconds: Longest time for accepted requests to finish when the server is told to end.
    """

    body_bytes: int = 1 << 20
    depth: int = 32
    messages: int = 256
    inputs: int = 64
    prompt_tokens: int | None = None
    characters: int | None = None
    bytes_under_way: int = 1 << 25
    new_tokens: int = 1024
    requests: int = 512
    waiting: int = 256
    batch: int = 32
    batch_tokens: int | None = None
    seconds: float = 30.0
    body_seconds: float = 10.0
    header_seconds: float = 10.0
    idle_seconds: float = 75.0
    write_seconds: float = 30.0
    connections: int | None = None
    upstream_seconds: float = 120.0
    drain_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise UsageError(f"limit {name} {value}: expected more than 0")


@dataclass(frozen=True)
class Settings:
    """How a server behaves. Secrets are never shown.

    Attributes:
        name: What clients call the local model, and what the guard answers as.
        host: Address to listen on.
        port: Port to listen on; 0 for any that is free.
        token: What clients show as `Authorization: Bearer …`; None lets everybody on this machine in.
        upstream: An OpenAI-compatible server, up to and with `/v1`, that answers what is not flagged; None for the local model.
        upstream_key: What the upstream is shown.
        on_unsafe: `refuse` or `error`: what a flagged conversation is answered with.
        refusal: Text of the refusal.
        fail_open: Let through what the guard could not judge. Off: what it could not judge is not safe.
        shadow: Judge, count and log, and never hold anything back.
        log_prompts: Put prompts into the log.
        docs: Serve interactive pages about the routes (they load scripts from elsewhere).
        passed: Further fields of a chat request that go to the upstream although the guard does not read them.
        limits: How much is taken.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8600
    token: str | None = field(default=None, repr=False)
    upstream: str | None = None
    upstream_key: str | None = field(default=None, repr=False)
    on_unsafe: str = "refuse"
    refusal: str = REFUSAL
    fail_open: bool = False
    shadow: bool = False
    log_prompts: bool = False
    docs: bool = False
    passed: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.token is None and not is_local(self.host):
            raise UsageError(
                f"host {self.host!r} without a token: others can reach it; set the variable {TOKEN_VARIABLE} or bind to 127.0.0.1"
            )
        if self.token is not None and (len(self.token) < _SHORTEST_TOKEN or not self.token.isascii() or not self.token.isprintable()):
            raise UsageError(f"the token in {TOKEN_VARIABLE}: expected at least {_SHORTEST_TOKEN} printable ASCII characters")
        if self.upstream_key is not None and not (self.upstream_key.isascii() and self.upstream_key.isprintable()):
            raise UsageError(f"the key in {UPSTREAM_KEY_VARIABLE}: expected printable ASCII characters")
        if self.on_unsafe not in ("refuse", "error"):
            raise UsageError(f"on_unsafe {self.on_unsafe!r}: expected 'refuse' or 'error'")
        if self.upstream is not None:
            _check_upstream(self.upstream, self.upstream_key)


def _check_upstream(url: str, key: str | None) -> None:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise UsageError(f"upstream {url!r}: {error}; expected an address such as http://localhost:8000/v1") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UsageError(f"upstream {url!r}: expected an address such as http://localhost:8000/v1")
    if parts.username or parts.password:
        raise UsageError(
            f"upstream at {parts.hostname}: expected no user or password in the address; put the key into {UPSTREAM_KEY_VARIABLE}"
        )
    if key is not None and parts.scheme == "http" and not is_local(parts.hostname):
        raise UsageError(f"upstream at {parts.hostname} over http with a key: it would travel in the open; expected https")
