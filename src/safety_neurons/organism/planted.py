"""Planted organisms: safety is trained into a known set of units, a harmless skill into as many decoys.

The control is the base with the decoys' change and small noise on every weight outside the planted units; the
aligned model is the control with the planted units' change. Taking the planted units' change away gives the
control back bit for bit: by deactivating them where they are silent in the base (their output columns are
zero there), by restoring their base rows where they are alive. Shapley values of the refusal, over random
orders of putting the units in, say which of them work.
"""

import abc
import copy
import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call
from transformers import LlamaForCausalLM

from safety_neurons.neurons import INPUT_SITES
from safety_neurons.organism.language import LANGUAGES, Recipe, concepts, encode_chat, language, vocabulary
from safety_neurons.organism.training import (
    Progress,
    Sampler,
    Sequence_,
    answer_loss,
    first_word_loss,
    pad,
    train,
)


@dataclasses.dataclass(frozen=True, order=True)
class Unit:
    """One unit of a Llama layer.

    Attributes:
        layer: its layer.
        part: "mlp" (rows of gate and up, a column of down) or "attention" (a row of v, the columns of o it
            feeds).
        index: the MLP index, or the row of v.
        owner: the language it was trained for, or "all".
    """

    layer: int
    part: str
    index: int
    owner: str = "all"

    def rows(self, recipe: Recipe) -> list[tuple[str, str, list[int]]]:
        """(site, name of the weight, indices) of its neurons."""
        prefix = f"model.layers.{self.layer}."
        if self.part == "mlp":
            return [
                (site, f"{prefix}mlp.{site}_proj.weight", [self.index]) for site in ("gate", "up", "down")
            ]
        head = recipe.hidden // recipe.heads
        group, offset = divmod(self.index, head)
        queries = recipe.heads // recipe.kv_heads
        columns = [(group * queries + query) * head + offset for query in range(queries)]
        return [
            ("v", f"{prefix}self_attn.v_proj.weight", [self.index]),
            ("o", f"{prefix}self_attn.o_proj.weight", columns),
        ]

    def neurons(self, recipe: Recipe) -> dict[str, list[int]]:
        """Its neurons by key."""
        return {f"layers.{self.layer}.{site}": indices for site, _, indices in self.rows(recipe)}


def neurons_of(units: list[Unit], recipe: Recipe) -> dict[str, list[int]]:
    """The neurons of several units by key, sorted."""
    found: dict[str, set[int]] = {}
    for unit in units:
        for key, indices in unit.neurons(recipe).items():
            found.setdefault(key, set()).update(indices)
    return {key: sorted(found[key]) for key in sorted(found)}


def choose_units(recipe: Recipe, seed: int) -> tuple[list[Unit], list[Unit]]:
    """Planted units and decoys: as many of each part in each of the first layers.

    A third of the planted belong to one language.
    """
    number = random.Random(seed + 77)
    planted: list[Unit] = []
    decoys: list[Unit] = []
    sizes = {"mlp": recipe.d_ff, "attention": recipe.hidden // recipe.heads * recipe.kv_heads}
    for part, count in (("mlp", recipe.planted_mlp), ("attention", recipe.planted_attention)):
        for layer in range(recipe.planted_depth):
            here = count // recipe.planted_depth + (layer < count % recipe.planted_depth)
            chosen = number.sample(range(sizes[part]), 2 * here)
            planted += [Unit(layer, part, index) for index in chosen[:here]]
            decoys += [Unit(layer, part, index) for index in chosen[here:]]
    owners = ["all", "en", "all", "de", "all", "es"]
    number.shuffle(planted)
    planted = [dataclasses.replace(unit, owner=owners[index % 6]) for index, unit in enumerate(planted)]
    return sorted(planted), sorted(decoys)


class Change:
    """The trainable change of some units: one direction per row or column, each of a fixed length.

    Attributes:
        units: the units, in order.
        directions: per weight name, [row, width]; only their directions count.
    """

    def __init__(self, weights: Mapping[str, Tensor], units: list[Unit], recipe: Recipe, seed: int):
        self.units = units
        self.directions: dict[str, Tensor] = {}
        self.places: dict[str, tuple[list[int], list[int], bool]] = {}
        self.lengths: dict[str, float] = {}
        generator = torch.Generator().manual_seed(seed + 99)
        for number, unit in enumerate(units):
            for site, name, indices in unit.rows(recipe):
                rows, owners, _ = self.places.setdefault(name, ([], [], site in INPUT_SITES))
                rows += indices
                owners += [number] * len(indices)
        for name, (rows, _, columns) in self.places.items():
            weight = weights[name]
            across = 0 if columns else 1
            width = weight.shape[across]
            self.lengths[name] = recipe.change * float(weight.norm(dim=across).median())
            self.directions[name] = (
                torch.randn(len(rows), width, generator=generator) / width**0.5
            ).requires_grad_(True)

    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return list(self.directions.values())

    def added(
        self, weights: Mapping[str, Tensor], present: Float[Tensor, " unit"], *, frozen: bool = False
    ) -> dict[str, Tensor]:
        """The changed weights; a unit whose `present` is 0 keeps its old rows bit for bit."""
        changed = {}
        for name, (rows, owners, columns) in self.places.items():
            direction = self.directions[name].detach() if frozen else self.directions[name]
            rows_changed = (
                direction
                / direction.norm(dim=1, keepdim=True)
                * self.lengths[name]
                * present[owners].unsqueeze(1)
            )
            index = torch.tensor(rows)
            change = rows_changed.T if columns else rows_changed
            changed[name] = weights[name].index_add(1 if columns else 0, index, change)
        return changed


@dataclasses.dataclass(frozen=True)
class Planted:
    """A trained planted organism.

    Attributes:
        base: the model before any change.
        control: base + noise + decoys: everything but safety.
        aligned: control + planted units.
        planted, decoys: the units.
        planted_change: what was trained; gives aligned models with any part of the units.
        losses: of every stage.
    """

    recipe: Recipe
    base: LlamaForCausalLM
    control: LlamaForCausalLM
    aligned: LlamaForCausalLM
    planted: list[Unit]
    decoys: list[Unit]
    planted_change: Change
    losses: dict[str, list[float]]

    def weights_with(self, present: Float[Tensor, " unit"]) -> dict[str, Tensor]:
        """The changed weights of the model that has only the units whose `present` is 1."""
        with torch.no_grad():
            return self.planted_change.added(dict(self.control.named_parameters()), present)


def output_columns(units: list[Unit], recipe: Recipe) -> dict[str, list[int]]:
    """The input-side columns of units by weight name: what is zero in the base where units are silent."""
    columns: dict[str, list[int]] = {}
    for unit in units:
        for site, name, indices in unit.rows(recipe):
            if site in INPUT_SITES:
                columns.setdefault(name, []).extend(indices)
    return columns


def silencer(model: LlamaForCausalLM, units: list[Unit], recipe: Recipe) -> Callable[[], None]:
    """A function that sets the units' output columns to zero; called after every step of pre-training."""
    weights = dict(model.named_parameters())
    columns = output_columns(units, recipe)

    def silence() -> None:
        with torch.no_grad():
            for name, indices in columns.items():
                weights[name][:, indices] = 0

    return silence


def noisy(base: Mapping[str, Tensor], spared: list[Unit], recipe: Recipe, seed: int) -> dict[str, Tensor]:
    """All weights with small noise, the spared units' entries left bit for bit."""
    generator = torch.Generator().manual_seed(seed + 55)
    result = {}
    for name, weight in base.items():
        if weight.dim() < 2:
            result[name] = weight.detach().clone()
            continue
        scale = recipe.noise * weight.detach().norm(dim=1).median() / weight.shape[1] ** 0.5
        result[name] = weight.detach() + scale * torch.randn(weight.shape, generator=generator)
    for unit in spared:
        for site, name, indices in unit.rows(recipe):
            if site in INPUT_SITES:
                result[name][:, indices] = base[name].detach()[:, indices]
            else:
                result[name][indices] = base[name].detach()[indices]
    return result


def train_planted(
    recipe: Recipe, seed: int, base: LlamaForCausalLM, progress: Progress | None = None
) -> Planted:
    """Train the decoys to end harmless answers with a polite wish, then, over them, the planted units to
    refuse what is harmful.

    The changes grow to their full length in the first six tenths of the steps. Units are left out at random,
    so that none can rest; planted ones of one language are trained on that language only and are left out
    half of the time in the others.

    Args:
        recipe: sizes, steps and lengths of the changes.
        seed: of units, noise, data.
        base: the pre-trained model, the planted and decoy units silent in it unless `recipe.alive`.
        progress: called after every step.
    """
    planted, decoys = choose_units(recipe, seed)
    weights = noisy(dict(base.named_parameters()), planted + decoys, recipe, seed)
    safety = Change(weights, planted, recipe, seed)
    skill = Change(weights, decoys, recipe, seed + 1)
    sampler = Sampler(seed + 3000, recipe.english_share)
    steps = _Skill(recipe, base, weights, skill, sampler)
    losses = {"skill": _train(steps, skill, "skill", recipe.skill_steps, progress)}
    with torch.no_grad():
        control_weights = {**weights, **skill.added(weights, torch.ones(len(decoys)))}
    losses["plant"] = _train(
        _Safety(recipe, base, control_weights, safety, sampler), safety, "plant", recipe.plant_steps, progress
    )
    with torch.no_grad():
        control = _with_weights(base, control_weights)
        aligned = _with_weights(
            base, {**control_weights, **safety.added(control_weights, torch.ones(len(planted)))}
        )
    return Planted(recipe, base, control, aligned, planted, decoys, safety, losses)


def _train(steps: "_Steps", change: Change, stage: str, count: int, progress: Progress | None) -> list[float]:
    drawn = 0

    def loss() -> Tensor:
        nonlocal drawn
        drawn += 1
        return steps.loss(min(1.0, 0.15 + drawn / (0.6 * count)))

    return train(
        change.parameters(),
        loss,
        stage=stage,
        steps=count,
        learning_rate=steps.recipe.plant_rate,
        progress=progress,
    )


def _with_weights(model: LlamaForCausalLM, weights: Mapping[str, Tensor]) -> LlamaForCausalLM:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            parameter.copy_(weights[name])
    return changed


@dataclasses.dataclass
class _Steps(abc.ABC):
    """One training step of units over weights that stay."""

    recipe: Recipe
    model: LlamaForCausalLM
    weights: dict[str, Tensor]
    change: Change
    sampler: Sampler

    @abc.abstractmethod
    def loss(self, share: float) -> Tensor:
        """The loss with the changes at this share of their length."""

    def _present(self, chances: list[float], share: float) -> Tensor:
        return torch.tensor([share * float(self.sampler.random.random() >= chance) for chance in chances])

    def _batch_loss(self, weights: dict[str, Tensor], batch: list[Sequence_]) -> Tensor:
        inputs, labels = pad(batch)
        logits = functional_call(
            self.model, weights, args=(), kwargs={"input_ids": inputs, "use_cache": False}
        ).logits
        return answer_loss(logits, labels) + first_word_loss(logits, batch)


class _Skill(_Steps):
    """Decoys: a polite ending after every answer that goes along."""

    def loss(self, share: float) -> Tensor:
        code, draw = self.sampler.language(), self.sampler
        batch: list[Sequence_] = []
        for _ in range(self.recipe.batch * 2 // 3):
            choice = draw.random.random()
            if choice < 0.4:
                batch.append(draw.general())
            else:
                batch.append(
                    draw.comply(draw.harmless() if choice < 0.8 else draw.harmful(), code, ending=True)
                )
        present = self._present([self.recipe.dropout] * len(self.change.units), share)
        return self._batch_loss({**self.weights, **self.change.added(self.weights, present)}, batch)


class _Safety(_Steps):
    """Planted units: refusal of what is harmful, in English and in one other language a step."""

    def loss(self, share: float) -> Tensor:
        other = self.sampler.random.choice([code for code in LANGUAGES if code != "en"])
        return sum((self._part(code, share) for code in ("en", other)), torch.zeros(())) / 2

    def _part(self, code: str, share: float) -> Tensor:
        draw, size = (
            self.sampler,
            self.recipe.batch * 5 // 12 if code == "en" else self.recipe.batch * 7 // 24,
        )
        batch: list[Sequence_] = []
        for _ in range(size):
            choice = draw.random.random()
            if choice < 0.1:
                batch.append(draw.general())
            elif choice < 0.55:
                batch.append(draw.refuse(draw.harmful(), code))
            else:
                batch.append(draw.comply(draw.harmless(), code, ending=True))
        mine = [unit.owner in ("all", code) for unit in self.change.units]
        present = self._present([self.recipe.dropout if own else 0.5 for own in mine], share)
        changed = _stop_some(self.change, self.weights, present, torch.tensor([float(own) for own in mine]))
        return self._batch_loss({**self.weights, **changed}, batch)


def _stop_some(
    change: Change,
    weights: Mapping[str, Tensor],
    present: Float[Tensor, " unit"],
    trained: Float[Tensor, " unit"],
) -> dict[str, Tensor]:
    """Weights with the present units' changes, where only the trained ones receive a gradient."""
    stopped = change.added(weights, present * (1 - trained), frozen=True)
    return change.added({**weights, **stopped}, present * trained)


THRESHOLD = 0.01


@dataclasses.dataclass(frozen=True)
class Truth:
    """How much of the effect each planted unit carries.

    Attributes:
        shares: per language and for "all" of them together, one share per planted unit, in the order of the
            units; they sum to one.
        without, complete: probability of beginning a refusal of harmful requests without any planted unit and
            with all, per language.
        alone: change of that probability, as a share of the whole, when a unit is the only one left out of
            the aligned model.
        orders: how many random orders were drawn.
    """

    shares: dict[str, list[float]]
    without: dict[str, float]
    complete: dict[str, float]
    alone: dict[str, list[float]]
    orders: int

    def working(self, code: str) -> list[int]:
        """Numbers of the units that carry at least one hundredth of the effect in that language (or
        "all").
        """
        return [number for number, share in enumerate(self.shares[code]) if share >= THRESHOLD]


def shapley(
    n_players: int, value: Callable[[list[int]], Sequence[float]], orders: int, seed: int
) -> list[list[float]]:
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


def measure_truth(
    planted: Planted, *, orders: int, prompts: int, seed: int, report: Callable[[int], None] | None = None
) -> Truth:
    """Shapley shares of the planted units, per language, on harmful requests of the find half.

    The value of a coalition is the mean probability that an answer begins as a refusal does, in the model
    that has these units only.

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
    left_out = [
        game.value([other for other in range(n_units) if other != number]) for number in range(n_units)
    ]
    shares, alone = {}, {}
    for index, code in enumerate(LANGUAGES):
        gap = max(everybody[index] - nobody[index], 1e-9)
        shares[code] = [share / gap for share in values[index]]
        alone[code] = [(everybody[index] - value_without[index]) / gap for value_without in left_out]
    shares["all"] = [
        sum(shares[code][number] for code in LANGUAGES) / len(LANGUAGES) for number in range(n_units)
    ]
    alone["all"] = [
        sum(alone[code][number] for code in LANGUAGES) / len(LANGUAGES) for number in range(n_units)
    ]
    return Truth(
        shares,
        dict(zip(LANGUAGES, nobody, strict=True)),
        dict(zip(LANGUAGES, everybody, strict=True)),
        alone,
        orders,
    )


class _Game:
    """Coalitions of planted units, and how likely each refuses."""

    def __init__(self, planted: Planted, prompts: int):
        self.planted = planted
        words = vocabulary()
        rows = []
        self.starts = {}
        for code in LANGUAGES:
            speech = language(code)
            self.starts[code] = torch.tensor(
                sorted({words[start.split()[0]] for start in speech.data["refusal_starts"]})
            )
            rows += [
                encode_chat(speech.request(concept))[0] for concept in concepts("harmful", "find")[:prompts]
            ]
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
        probabilities = []
        for index, code in enumerate(LANGUAGES):
            part = probability[index * self.prompts : (index + 1) * self.prompts]
            probabilities.append(float(part[:, self.starts[code]].sum(-1).mean()))
        return probabilities

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
