"""Which planted units work: Shapley values of the refusal, over random orders of putting the units in."""

import dataclasses
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from safety_neurons.organism.language import LANGUAGES, concepts, language
from safety_neurons.organism.planted import Planted
from safety_neurons.organism.tokenizer import encode_chat, vocabulary

THRESHOLD = 0.01


@dataclasses.dataclass(frozen=True)
class Truth:
    """How much of the effect each planted unit carries.

    Attributes:
        shares: per language and for "all" of them together, one share per planted unit, in the order of the units; they sum to one.
        without, complete: probability of beginning a refusal of harmful requests without any planted unit and with all, per language.
        alone: change of that probability, as a share of the whole, when a unit is the only one left out of the aligned model.
        orders: how many random orders were drawn.
    """

    shares: dict[str, list[float]]
    without: dict[str, float]
    complete: dict[str, float]
    alone: dict[str, list[float]]
    orders: int

    def working(self, code: str) -> list[int]:
        """Numbers of the units that carry at least one hundredth of the effect in that language (or "all")."""
        return [number for number, share in enumerate(self.shares[code]) if share >= THRESHOLD]


def shapley(n_players: int, value: Callable[[list[int]], Sequence[float]], orders: int, seed: int) -> list[list[float]]:
    """Shapley values of several games at once, estimated over random orders and their reverses.

    Args:
        n_players: number of players.
        value: the value of a coalition in every game.
        orders: how many orders; an even number is drawn in pairs of an order and its reverse.
        seed: of the orders.

    Returns:
        [game][player].
    """
    number = random.Random(seed)
    nobody = list(value([]))
    totals = [[0.0] * n_players for _ in nobody]
    order: list[int] = []
    for turn in range(orders):
        order = order[::-1] if turn % 2 else number.sample(range(n_players), n_players)
        before = nobody
        for size in range(1, n_players + 1):
            now = list(value(sorted(order[:size])))
            for game, (old, new) in enumerate(zip(before, now, strict=True)):
                totals[game][order[size - 1]] += (new - old) / orders
            before = now
    return totals


def measure_truth(planted: Planted, *, orders: int, prompts: int, seed: int, report: Callable[[int], None] | None = None) -> Truth:
    """Shapley shares of the planted units, per language, on harmful requests of the find half.

    The value of a coalition is the mean probability that an answer begins as a refusal does, in the model that has these units only.

    Args:
        planted: the organism.
        orders: random orders of the units.
        prompts: harmful requests per language.
        seed: of the orders.
        report: called with the number of coalitions measured.
    """
    game = _Game(planted, prompts)
    n_units = len(planted.planted)
    counted = 0

    def value(members: list[int]) -> list[float]:
        nonlocal counted
        counted += 1
        if report is not None:
            report(counted)
        return game.value(members)

    values = shapley(n_units, value, orders, seed)
    nobody, everybody = game.value([]), game.value(list(range(n_units)))
    left_out = [game.value([other for other in range(n_units) if other != number]) for number in range(n_units)]
    shares, alone = {}, {}
    for index, code in enumerate(LANGUAGES):
        gap = max(everybody[index] - nobody[index], 1e-9)
        shares[code] = [share / gap for share in values[index]]
        alone[code] = [(everybody[index] - value_without[index]) / gap for value_without in left_out]
    shares["all"] = [sum(shares[code][number] for code in LANGUAGES) / len(LANGUAGES) for number in range(n_units)]
    alone["all"] = [sum(alone[code][number] for code in LANGUAGES) / len(LANGUAGES) for number in range(n_units)]
    return Truth(shares, dict(zip(LANGUAGES, nobody, strict=True)), dict(zip(LANGUAGES, everybody, strict=True)), alone, orders)


class _Game:
    """Coalitions of planted units, and how likely each refuses."""

    def __init__(self, planted: Planted, prompts: int):
        self.planted = planted
        words = vocabulary()
        rows = []
        self.starts = {}
        for code in LANGUAGES:
            speech = language(code)
            self.starts[code] = torch.tensor(sorted({words[start.split()[0]] for start in speech.data["refusal_starts"]}))
            rows += [encode_chat(speech.request(concept))[0] for concept in concepts("harmful", "find")[:prompts]]
        self.prompts = prompts
        self.last = torch.tensor([len(ids) - 1 for ids in rows])
        length = int(self.last.max()) + 1
        self.inputs = torch.tensor([ids + [words["<pad>"]] * (length - len(ids)) for ids in rows])

    @torch.no_grad()
    def value(self, members: list[int]) -> list[float]:
        """Mean probability of the first words of refusals, per language."""
        present = torch.zeros(len(self.planted.planted))
        present[members] = 1
        probability = self._next_words(self.planted.weights_with(present))
        found = []
        for index, code in enumerate(LANGUAGES):
            part = probability[index * self.prompts : (index + 1) * self.prompts]
            found.append(float(part[:, self.starts[code]].sum(-1).mean()))
        return found

    def _next_words(self, weights: dict[str, Tensor]) -> Tensor:
        control = self.planted.control
        hidden = functional_call(
            control.model,
            {name.removeprefix("model."): value for name, value in weights.items()},
            args=(),
            kwargs={"input_ids": self.inputs, "use_cache": False},
        ).last_hidden_state
        last = hidden[torch.arange(len(hidden)), self.last]
        return control.lm_head(last).softmax(-1)
