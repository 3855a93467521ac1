"""Endpoint: completions from an OpenAI-compatible server (vLLM, SGLang, …) in the place of a model in memory."""

import concurrent.futures
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from safety_neurons.errors import UsageError
from safety_neurons.model.chat_server import FILTERED, ChatServer, OddReplyError, RefusedRequestError, ServerError
from safety_neurons.model.language_model import Texts
from safety_neurons.model.measures import BatchSize, Progress
from safety_neurons.prompts import Prompt, as_prompts
from safety_neurons.results import Completion, Completions, conversation_of

CONCURRENT = 8
_GOES_ON = {"add_generation_prompt": False, "continue_final_message": True}
"""Of vLLM and SGLang: an answer that is begun is gone on with. Other servers refuse the request rather than begin another answer."""
_ENDED = frozenset({"stop", "eos", "eos_token", "end_turn", "stop_sequence", "stop_string"})
_CUT = frozenset({"length", "max_tokens", "model_length"})
_UNREADABLE, _REFUSED = "unreadable", "refused_request"
_MEANING = {
    FILTERED: "were held back by the server's content filter",
    "tool_calls": "call a tool in the place of an answer",
    _UNREADABLE: "could not be read",
    _REFUSED: "failed, since the server refused the request",
}


class Endpoint:
    """A model behind a URL. It is asked chat turns and gives completions; activations and log-likelihoods it has none.

    Args:
        url: Up to and with the version, then the model's name on the server: `http://localhost:8000/v1#MODEL`.
        model: Name of the model, where it does not stand behind the address.
        system: System prompt for prompts that bring none.
        request: Entries of every request that go before those of a call; None leaves one out, such as
            `{"max_tokens": None, "temperature": None, "max_completion_tokens": 512}`.
        think_end: Text that ends the model's thinking, where it is none of the marks that are known.
        **connection: As `ChatServer` takes them: key_variable, timeout, retries, backoff, offline.

    Raises:
        UsageError: No such address, or no name of a model.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        system: str | None = None,
        request: Mapping[str, Any] | None = None,
        think_end: str | None = None,
        **connection: Any,
    ) -> None:
        address, _, named = url.partition("#")
        self.model = model or named
        if not self.model:
            raise UsageError(f"endpoint {url!r} names no model; expected it behind the address, such as http://localhost:8000/v1#MODEL")
        self.system = system
        self.request = dict(request or {})
        self.think_end = think_end or None
        self._server = ChatServer(address, self.model, **{"timeout": 120.0, **connection})

    def __repr__(self) -> str:
        return f"Endpoint({self.name!r})"

    @property
    def name(self) -> str:
        """Address and model."""
        return f"{self._server.url}#{self.model}"

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
            progress: Called as `progress(prompts done, prompts in all, 0)`: tokens are not known.
            done: Completions of an earlier, interrupted call; their prompts are not asked again.
            answered: Called with every completion as soon as it is there.
            notes: Gets a line for what had to be said.
            **settings: Further entries of the request, such as `stop`.

        Returns:
            One completion a prompt, in the order of the prompts; `token_ids` are not known. A prompt or answer that the server's filter
            holds back, a call of a tool, a reply that cannot be read and a request that is refused for what is in it (too long, say) are
            completions without text: `meta` has the server's `finish_reason`, or what it said under `error`, judges leave them unscored,
            and the notes say how many there are. What was refused is asked again by a later call.

        Raises:
            ServerError: The server cannot be reached, takes no key or address, refuses every request, or gives no answer that can be read.
        """
        asked = as_prompts(prompts)
        before = {completion.prompt_id: completion for completion in done or ()}
        results = {
            index: one
            for index, prompt in enumerate(asked)
            if (one := before.get(prompt.id)) is not None and one.answers(prompt) and one.finish_reason != "failed"
        }
        body = {"max_tokens": max_new_tokens, "temperature": temperature if sample else 0.0, "seed": seed}
        if sample:
            body["top_p"] = top_p
        body = {**body, **self.request, **settings}
        unusual: Counter[str] = Counter()
        why: dict[str, int] = {}
        with concurrent.futures.ThreadPoolExecutor(CONCURRENT if batch_size == "auto" else batch_size) as pool:
            waiting = {pool.submit(self._answer, prompt, body): index for index, prompt in enumerate(asked) if index not in results}
            try:
                for future in concurrent.futures.as_completed(waiting):
                    index = waiting[future]
                    results[index] = one = self._completion(asked[index], future, arm, seed)
                    unusual.update([one.meta["finish_reason"]] if "finish_reason" in one.meta else [])
                    if "error" in one.meta:
                        why[one.meta["error"]] = why.get(one.meta["error"], 0) + 1
                    if unusual[_UNREADABLE] == len(asked):
                        raise OddReplyError(f"{self._server.url} gave no answer that can be read; expected OpenAI's chat completions")
                    if unusual[_REFUSED] and unusual[_REFUSED] + unusual[_UNREADABLE] == len(asked):
                        raise ServerError(
                            f"{max(why, key=lambda said: why[said])}; all of {len(asked)} requests failed, expected answers: "
                            "rename or leave out the fields that it names with --request"
                        )
                    if answered is not None:
                        answered(results[index])
                    if progress is not None:
                        progress(len(results), len(asked), 0)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if notes is not None:
            notes += [
                f"{count} of {len(asked)} answers {_MEANING.get(reason, f'ended in {reason!r}')}" for reason, count in unusual.items()
            ]
            notes += [
                f"the server takes no {name!r}: {f'{new!r} was sent instead' if new else 'it was left out'}"
                for name, new in self._server.changed.items()
            ]
            notes += [f"{count} requests refused: {said}" for said, count in sorted(why.items(), key=lambda entry: -entry[1])[:3]]
        return Completions([results[index] for index in range(len(asked))])

    def _completion(self, prompt: Prompt, future: concurrent.futures.Future[tuple[str, str]], arm: str, seed: int) -> Completion:
        """What came back for a prompt, a request that was refused for what is in it among it.

        Raises:
            ServerError: Any other failure.
        """
        meta: dict[str, Any] = {**conversation_of(prompt), **({"think_end": self.think_end} if self.think_end else {})}
        try:
            text, reason = future.result()
        except RefusedRequestError as error:
            meta |= {"finish_reason": _REFUSED, "error": str(error)}
            return Completion(prompt.id, prompt.text, "", (), "failed", arm, seed, {}, meta)
        odd = {} if reason in _ENDED | _CUT else {"finish_reason": reason}
        return Completion(prompt.id, prompt.text, text, (), "length" if reason in _CUT else "stop", arm, seed, {}, {**meta, **odd})

    def _turns(self, prompt: Prompt) -> list[dict[str, str]]:
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt.messages] or [{"role": "user", "content": prompt.text}]
        if self.system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system})
        return turns

    def _answer(self, prompt: Prompt, settings: Mapping[str, Any]) -> tuple[str, str]:
        """Text, and why it ends; a refusal that the server marks as one is the text."""
        turns = self._turns(prompt)
        begun = _GOES_ON if turns[-1]["role"] == "assistant" else {}
        try:
            reply = self._server.chat(turns, **{**begun, **settings})
        except OddReplyError:
            return "", _UNREADABLE
        return reply.text or reply.refusal, FILTERED if reply.finish_reason == "safety" else reply.finish_reason
