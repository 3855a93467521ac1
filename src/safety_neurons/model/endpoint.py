"""Endpoint: completions from an OpenAI-compatible server (vLLM, SGLang, …) in the place of a model in memory."""

import concurrent.futures
import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from safety_neurons.errors import ModelError, UsageError
from safety_neurons.model.language_model import Texts, as_prompts
from safety_neurons.model.measures import BatchSize, Progress
from safety_neurons.prompts import Prompt
from safety_neurons.results import Completion, Completions

ATTEMPTS = 6
CONCURRENT = 8
_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_FILTERED = frozenset({"content_filter", "safety"})


class Endpoint:
    """A model behind a URL. It is asked chat turns and gives completions; activations and log-likelihoods it has none.

    Args:
        url: Up to and with the version, such as `http://localhost:8000/v1`; `#MODEL` behind it names the model.
        model: Name of the model on the server; the only one it serves where there is none.
        system: System prompt for prompts that bring none.
        api_key: The key; by default what the environment variable `api_key_env` holds.
        api_key_env: Name of that variable.
        timeout: Seconds an answer may take.
        attempts: How often a request is tried where the server is busy or cannot be reached.
        pause: Seconds before the second attempt; doubled before every further one.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        system: str | None = None,
        api_key: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        timeout: float = 120.0,
        attempts: int = ATTEMPTS,
        pause: float = 0.5,
    ) -> None:
        address, _, named = url.partition("#")
        if not address.startswith(("http://", "https://")):
            raise UsageError(f"endpoint {url!r}: expected an address such as http://localhost:8000/v1")
        self.url = address.rstrip("/")
        self.system, self.timeout, self.attempts, self.pause = system, timeout, attempts, pause
        self._key = api_key if api_key is not None else os.environ.get(api_key_env)
        self._model = model or named or None

    def __repr__(self) -> str:
        return f"Endpoint({self.name!r})"

    @property
    def name(self) -> str:
        """Address and model."""
        return f"{self.url}#{self.model}"

    @property
    def model(self) -> str:
        """Name of the model on the server.

        Raises:
            ModelError: The server serves none, or several and none was named.
        """
        if self._model is None:
            listed = [str(entry.get("id")) for entry in self._ask("/models", None).get("data") or []]
            if len(listed) != 1:
                shown = ", ".join(listed[:5]) or "none"
                raise ModelError(f"{self.url} serves {len(listed)} models ({shown}); expected one: name it behind the address as #MODEL")
            self._model = listed[0]
        return self._model

    def complete(
        self,
        prompts: Texts,
        *,
        max_new_tokens: int = 128,
        sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: BatchSize = "auto",
        arm: str = "untreated",
        progress: Progress | None = None,
        done: Completions | None = None,
        answered: Callable[[Completion], None] | None = None,
        notes: list[str] | None = None,
        **settings: Any,
    ) -> Completions:
        """Answers prompts as `LanguageModel.complete` does, greedy unless `sample` is set; several requests are under way at a time.

        Args:
            prompts: Prompts, or plain texts; a prompt's own turns are sent as they are.
            max_new_tokens: Longest answer.
            sample: Draw tokens.
            temperature: Of sampling.
            top_p: Of sampling.
            seed: Of sampling, where the server knows seeds.
            batch_size: Requests at a time; 8 where `auto`.
            arm: Recorded in every completion.
            progress: Called as `progress(prompts done, prompts in all, tokens generated)`.
            done: Completions of an earlier, interrupted call; their prompts are not asked again.
            answered: Called with every completion as soon as it is there.
            notes: Gets a line for what had to be said.
            **settings: Further entries of the request, such as `stop`.

        Returns:
            One completion a prompt, in the order of the prompts; `token_ids` are not known.

        Raises:
            ModelError: The server cannot be reached, refuses the request, or answers in another shape.
        """
        asked = as_prompts(prompts)
        before = {completion.prompt_id: completion for completion in done or ()}
        results = {index: before[prompt.id] for index, prompt in enumerate(asked) if prompt.id in before}
        body = {"model": self.model, "max_tokens": max_new_tokens, "temperature": temperature if sample else 0.0, "seed": seed, **settings}
        if sample:
            body["top_p"] = top_p
        tokens, filtered = 0, 0
        with concurrent.futures.ThreadPoolExecutor(CONCURRENT if batch_size == "auto" else batch_size) as pool:
            waiting = {
                pool.submit(self._answer, {**body, "messages": self._turns(prompt)}): index
                for index, prompt in enumerate(asked)
                if index not in results
            }
            try:
                for future in concurrent.futures.as_completed(waiting):
                    index, (text, reason, used) = waiting[future], future.result()
                    meta = {"finish_reason": reason} if reason in _FILTERED else {}
                    tokens, filtered = tokens + used, filtered + bool(meta)
                    cut = "length" if reason == "length" else "stop"
                    results[index] = Completion(asked[index].id, asked[index].text, text, (), cut, arm, seed, {}, meta)  # type: ignore[arg-type]
                    if answered is not None:
                        answered(results[index])
                    if progress is not None:
                        progress(len(results), len(asked), tokens)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if filtered and notes is not None:
            notes.append(f"{filtered} of {len(asked)} answers were held back by the server's content filter")
        return Completions([results[index] for index in range(len(asked))])

    def _turns(self, prompt: Prompt) -> list[dict[str, str]]:
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt.messages] or [{"role": "user", "content": prompt.text}]
        if self.system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system})
        return turns

    def _answer(self, body: Mapping[str, Any]) -> tuple[str, str, int]:
        """Text, why it ends, and its tokens where the server counts them."""
        found = self._ask("/chat/completions", body)
        try:
            choice = found["choices"][0]
            text = choice["message"].get("content") or ""
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ModelError(f"{self.url} answered {json.dumps(found)[:80]}; expected choices with a message, as OpenAI's chat") from None
        return str(text), str(choice.get("finish_reason") or "stop"), int((found.get("usage") or {}).get("completion_tokens") or 0)

    def _ask(self, path: str, body: Mapping[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(1, self.attempts + 1):
            wait = self.pause * 2 ** (attempt - 1) * (1 + random.random() / 4)  # noqa: S311 - spreads requests, decides nothing
            try:
                request = urllib.request.Request(self.url + path, data, headers)  # noqa: S310 - http(s) is checked above
                with urllib.request.urlopen(request, timeout=self.timeout) as response:  # noqa: S310
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                said = error.read(300).decode("utf-8", "replace")
                if error.code not in _AGAIN or attempt == self.attempts:
                    raise ModelError(f"{self.url}{path} answered {error.code}: {' '.join(said.split())[:120]}") from None
                wait = max(wait, _seconds(error.headers.get("Retry-After")))
            except (OSError, http.client.HTTPException) as error:
                if attempt == self.attempts:
                    why = getattr(error, "reason", None) or error
                    raise ModelError(f"{self.url} cannot be reached ({why}); expected a running server: check address and port") from None
            except ValueError as error:
                raise ModelError(f"{self.url}{path} did not answer in JSON ({error}); expected an OpenAI-compatible server") from None
            time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")


def _seconds(text: str | None) -> float:
    return min(60.0, float(text)) if text and text.strip().isdigit() else 0.0
