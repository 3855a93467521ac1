"""What a guard is bound to: architecture, the weights that reach its features, adapters, tokenizer, template, and a probe that shows it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from safety_neurons.errors import ForeignModelError, InputError, MismatchError
from safety_neurons.model import LanguageModel
from safety_neurons.model.identity import plain_name, template_sha256, tokenizer_sha256, weights_sha256
from safety_neurons.neurons import NeuronSet, parse_key


@dataclass(frozen=True)
class Bindings:
    """What a guard belongs to.

    Attributes:
        model: name, for people.
        model_fingerprint: of the architecture.
        weights_sha256: of the weights that reach the guard's neurons: embeddings and layers up to the last neuron's, adapters included.
        dtype: what these weights are in.
        tokenizer_sha256: of its vocabulary, special tokens, and what it makes of some texts.
        template_sha256: of the template, system prompt and template arguments.
    """

    model: str
    model_fingerprint: str
    weights_sha256: str
    dtype: str
    tokenizer_sha256: str
    template_sha256: str

    def to_json(self) -> dict[str, str]:
        """The fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Any) -> "Bindings":
        """The bindings that `to_json` wrote.

        Raises:
            InputError: damaged.
        """
        names = list(cls.__dataclass_fields__)
        if not isinstance(found, Mapping) or not all(isinstance(found.get(name), str) for name in names):
            raise InputError(f"a guard without whole bindings; expected the strings {', '.join(names)}: fit or copy it again")
        return cls(**{name: found[name] for name in names})

    def check(self, model: LanguageModel, neurons: NeuronSet) -> None:
        """Raise an error unless the model is the one that the guard was fit on.

        Cost: one SHA-256 over the weights, a second for two gigabytes and core.

        Raises:
            ForeignModelError: another architecture. MismatchError: other weights, number type, adapters, tokenizer or template.
        """
        if model.fingerprint != self.model_fingerprint:
            raise ForeignModelError(
                f"the guard was fit on {self.model} (fingerprint {self.model_fingerprint[:12]}), expected {model.name} "
                f"({model.fingerprint[:12]}); fit a guard on this model"
            )
        found = bindings_of(model, neurons)
        for name, words, advice in (
            ("tokenizer_sha256", "another tokenizer", "load the model with the tokenizer it was fit with, or recalibrate it"),
            ("template_sha256", "another template or system prompt", "use the same --template and --system, or recalibrate it"),
            ("dtype", f"weights in {self.dtype}, this model's are in {found.dtype}", "load the model with that --dtype, or recalibrate it"),
            ("weights_sha256", "other weights or adapters", "load the model it was fit on, or recalibrate it (guard recalibrate)"),
        ):
            ours, theirs = getattr(self, name), getattr(found, name)
            if ours != theirs:
                hashes = "" if name == "dtype" else f" ({ours[:12]}, not {theirs[:12]})"
                raise MismatchError(f"the guard was fit on {self.model} with {words}{hashes}; {advice}")


def bindings_of(model: LanguageModel, neurons: NeuronSet) -> Bindings:
    """The bindings of a guard on these neurons of a model as it is now.

    Source: none of the papers; a probe fit on one model says nothing of another (arXiv 2604.28129).
    """
    last = max(parse_key(key).layer for key in neurons.keys())  # noqa: SIM118 - not a mapping
    with model.active():
        weights, dtypes = weights_sha256(model, _reaching(model, last))
    return Bindings(model.name, model.fingerprint, weights, "+".join(dtypes), tokenizer_sha256(model.tokenizer), template_sha256(model))


def _reaching(model: LanguageModel, last_layer: int) -> Callable[[str, Tensor], bool]:
    """Whether a weight can reach neurons of layers up to the last one: the head and later layers cannot."""
    prefixes = {f"{plain_name(part.module_name)}.": part.index for part in model.anatomy.layers}
    inner = model.inner
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    embedding = inner.get_input_embeddings().weight
    heads = {id(value) for value in head.parameters() if value is not embedding} if head is not None else set()

    def wanted(name: str, value: Tensor) -> bool:
        return id(value) not in heads and next((index for prefix, index in prefixes.items() if name.startswith(prefix)), -1) <= last_layer

    return wanted
