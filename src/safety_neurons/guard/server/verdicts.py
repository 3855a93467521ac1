"""Routes that give verdicts: OpenAI's moderations, the classifier that NeMo Guardrails asks, LiteLLM's generic guardrail."""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from safety_neurons.guard.requests import Reading, readings
from safety_neurons.guard.server.conversation import conversation, text_of, texts_in
from safety_neurons.guard.server.gate import Gate, Outcome
from safety_neurons.guard.server.problems import Problem
from safety_neurons.guard.server.settings import Settings
from safety_neurons.guard.server.shapes import ClassifyRequest, GuardrailRequest, ModerationRequest, Part, Turn
from safety_neurons.prompts import Prompt

MODERATIONS, CLASSIFY, GUARDRAIL = "/v1/moderations", "/classify", "/beta/litellm_basic_guardrail_api"
REASONS = {
    "ok": "the guard expects an unsafe answer",
    "truncated": "the prompt is longer than the guard reads",
    "error": "the guard could not judge the prompt",
    "timeout": "the guard did not finish in time",
}
"""Why a prompt is held back, in words that say nothing about how nearly it was not."""


class Verdicts:
    """Judges texts and conversations for others.

    Args:
        settings: Limits, and the name the guard answers as.
        gate: Judges.
    """

    def __init__(self, settings: Settings, gate: Gate) -> None:
        self.settings, self.gate = settings, gate

    async def moderate(self, request: ModerationRequest, noted: dict[str, Any]) -> dict[str, Any]:
        """OpenAI's moderations: a string, a list of strings, the parts of a message, or the turns of a conversation."""
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
        """LiteLLM's generic guardrail: the conversation where it is given, else the texts; tools by themselves."""
        if request.input_type == "response":
            raise Problem(
                400,
                "this guard reads prompts, not answers; expected mode pre_call or during_call",
                "unsupported_input_type",
                param="input_type",
            )
        if request.images:
            return self._unread("images are not read by the guard", noted)
        texts = list(request.texts or ())
        asked = [readings(Prompt(str(number), text)) for number, text in enumerate(texts)]
        if request.structured_messages:
            try:
                whole = conversation(request.structured_messages, self.settings.limits.messages)
            except Problem as problem:
                if problem.code != "unreadable_content":
                    raise
                return self._unread(problem.message, noted)
            read = {turn.content for way in whole for turn in way.prompt.turns}
            asked = [whole, *(ways for ways in asked if ways[0].prompt.text not in read)]
        for name, values in (("tools", request.tools), ("tool_calls", request.tool_calls)):
            asked += [[Reading(name, Prompt(name, text)) for text in texts_in(values)]] if values else []
        if not asked:  # what cannot be shown as text, token ids say, comes as nothing
            return self._unread("there is nothing that the guard can read", noted)
        outcomes = await self._judged(asked, GUARDRAIL, noted)
        held = next((outcome for outcome in outcomes if outcome.held), None)
        if held is None:
            return {"action": "NONE", "blocked_reason": None}
        return {"action": "BLOCKED", "blocked_reason": REASONS.get(held.status, REASONS["error"])}

    def _unread(self, reason: str, noted: dict[str, Any]) -> dict[str, Any]:
        """What the guard cannot read is not safe, unless the server fails open or only watches."""
        noted["guard"] = "unreadable"
        self.gate.metrics.errors.labels("unreadable").inc()
        if self.settings.fail_open or self.settings.shadow:
            return {"action": "NONE", "blocked_reason": None}
        self.gate.metrics.blocked.labels(GUARDRAIL).inc()
        return {"action": "BLOCKED", "blocked_reason": reason}

    def _asked(self, given: str | Sequence[str | Part | Turn]) -> list[list[Reading]]:
        """The readings of each text, or of the one message or conversation, that an input holds."""
        if isinstance(given, str):
            return [readings(Prompt("0", given))]
        turns = [one for one in given if isinstance(one, Turn)]
        if turns:
            return [conversation(turns, self.settings.limits.messages)]
        parts = [text_of(part, f"input[{place}]") for place, part in enumerate(given) if isinstance(part, Part)]
        if parts:
            alone = [Reading(f"part {place}", Prompt("0", text)) for place, text in enumerate(parts, 1) if len(parts) > 1 and text.strip()]
            return [[*readings(Prompt("0", "\n".join(parts))), *alone]]
        return [readings(Prompt(str(number), str(text))) for number, text in enumerate(given)]

    async def _judged(self, asked: Sequence[Sequence[Reading]], route: str, noted: dict[str, Any]) -> list[Outcome]:
        if len(asked) > self.settings.limits.inputs:
            message = f"{len(asked)} texts; expected at most {self.settings.limits.inputs}"
            raise Problem(400, message, "too_many_inputs", param="texts" if route == GUARDRAIL else "input")
        if self.settings.log_prompts:
            noted["prompt"] = [[turn.content for turn in ways[0].prompt.messages] or ways[0].prompt.text for ways in asked]
        return await self.gate.judge(asked, route, noted)


def _moderation(outcome: Outcome) -> dict[str, Any]:
    score = _shown(outcome)
    return {
        "flagged": outcome.held,
        "categories": {"unsafe": outcome.held},
        "category_scores": {"unsafe": score},
        "category_applied_input_types": {"unsafe": ["text"]},
        "guard": outcome.record,
    }


def _classification(number: int, outcome: Outcome) -> dict[str, Any]:
    score = _shown(outcome)
    label = "unsafe" if outcome.held else "safe"
    return {"index": number, "label": label, "probs": [1.0 - score, score], "num_classes": 2, "guard": outcome.record}


def _shown(outcome: Outcome) -> float:
    """A probability for places that must have one: certainty of what is done where the guard could not judge."""
    return outcome.p_unsafe if outcome.p_unsafe is not None else float(outcome.held)
