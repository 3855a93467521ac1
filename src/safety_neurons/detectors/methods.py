"""The methods that score neurons: each with its options, what it is shown, and where its formula is computed.

Nothing here imports torch or numpy, so that the command line can name every method at once. A method of one's
own is such a class, with `score` written in its body, registered by `register`; it may lie in any file.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
from collections.abc import Collection, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from safety_neurons.arguments import well_typed
from safety_neurons.declarations import Between, Count, Declaration, OneOf, Positive, Share, listed
from safety_neurons.detectors.rules import Ranked, Searched, Sized, Voted, WholeParts
from safety_neurons.errors import UsageError


@dataclasses.dataclass(frozen=True)
class HowFound(Declaration):
    """By which method a set is found on every group, and how large."""

    PANEL: ClassVar[str | None] = "Which neurons"

    method: str | None = None
    """As `compare` names them. [default: see above]"""
    units: Positive | None = None
    """Units in each set."""
    top: Share = 0.02
    """Share of the units in each set, without --units."""

    def check(self) -> None:
        """Also the name of the method."""
        super().check()
        if self.method is not None:
            by_name(self.method)


@dataclasses.dataclass(frozen=True)
class Method(Searched):
    """A way to score neurons; a subclass adds a rule of selection and its own options, and says how it
    scores.
    """

    PANEL: ClassVar[str | None] = Sized.PANEL
    NAME: ClassVar[str]
    PAIR: ClassVar[bool] = False
    """Whether it looks at a base and an aligned model, not at one."""
    DEFAULT_SITES: ClassVar[tuple[str, ...]] = ("q", "k", "v", "o", "gate", "up", "down")
    PROMPTS: ClassVar[bool] = True
    """Whether it looks at prompts; without it, only at weights."""
    HARMLESS: ClassVar[Literal["none", "optional", "needed"]] = "none"
    """Whether it is shown harmless prompts too."""
    GENERAL: ClassVar[Literal["none", "optional", "needed"]] = "none"
    """Whether it is shown general text too."""
    COMPLETIONS: ClassVar[bool] = False
    """Whether completions can be given to it in place of those it would generate."""
    ROUTED: ClassVar[bool] = True
    """Whether neurons of routed experts, which do not see every token, have a score."""
    SHARED: ClassVar[bool] = True
    """Whether neurons of shared experts have one."""
    SCORER: ClassVar[str] = ""
    """`module:function` of the formula, imported when it is needed.

    A method of one's own defines `score` instead.
    """
    WRITES: ClassVar[int] = 0
    """Tokens that its models write for every prompt, to explain them, beside `--max-new-tokens`."""
    STATISTICS: ClassVar[int] = 3
    """float64 numbers that it keeps for every neuron searched."""

    READER: ClassVar[str] = ""
    """`module:function` of what every batch goes through, of the method and a model, as a context.

    For methods whose time a plan cannot tell from operations, so that it is measured.
    """

    PASSES: ClassVar[float | int] = 1
    """How often each of its models reads a prompt, a backward pass counted as two."""

    def passes(self, heads: float | int) -> float | int:  # noqa: ARG002
        """`PASSES`, where options change it, or the heads searched, each by the share of layers it runs."""
        return self.PASSES

    @classmethod
    def shown(cls) -> dict[str, bool]:
        """The other texts it is shown, and whether it needs them."""
        told = {"harmless": cls.HARMLESS, "general": cls.GENERAL}
        return {name: need == "needed" for name, need in told.items() if need != "none"}

    @property
    def searched(self) -> tuple[str, ...]:
        """The sites that are searched."""
        return self.DEFAULT_SITES if self.sites is None else listed(self.sites) or ()

    def unfit(self, keys: Collection[str]) -> str:
        """Why it cannot score neurons of a model that has these site keys; empty where it can."""
        without = [".experts."] * (not self.ROUTED) + [".shared_expert."] * (not self.SHARED)
        expert = next((key for key in self._among(keys) if any(part in key for part in without)), None)
        return (
            ""
            if expert is None
            else f"{expert} is an expert's, and {self.NAME} scores attention and dense feed-forward "
            "parts; use --sites q,k,v,o"
        )

    def _among(self, keys: Collection[str]) -> list[str]:
        """Those of a model's site keys that are searched."""
        from safety_neurons.neurons import parse_key, parse_layers

        parsed = {key: parse_key(key) for key in keys}
        n_layers = 1 + max((one.layer for one in parsed.values()), default=0)
        layers = parse_layers(self.layers, n_layers)
        return [key for key, one in parsed.items() if one.site in self.searched and one.layer in layers]

    def config(self, run: Any) -> dict[str, Any]:
        """What decides the scores, beside models and prompts.

        It stands in the provenance and in the resume key.
        """
        shared = {field.name for base in (Method, Voted) for field in dataclasses.fields(base)}
        own = {name: value for name, value in self.values().items() if name not in shared}
        others = {f"{name}_sha256": getattr(run, name) for name in self.shown()}
        return (
            own
            | {name: text.sha256 for name, text in others.items() if text is not None}
            | self.searched_config()
        )

    def searched_config(self) -> dict[str, Any]:
        """What is searched, as it stands in the provenance."""
        return {
            "sites": list(self.searched),
            "layers": list(self.layers) if isinstance(self.layers, range) else self.layers,
        }

    def score(self, run: Any) -> Any:
        """Scores of the searched neurons (`runner.Scored`) of what is to be looked at (`runner.Run`)."""
        return _function(self.SCORER)(self, run)

    def reading(self) -> Any:
        """What every batch goes through, for plans (`model.pace.Reading`); None: operations tell its time."""
        return self._read if self.READER else None

    def _read(self, model: Any) -> Any:
        return _function(self.READER)(self, model)


def _function(named: str) -> Any:
    """The function that `module:function` of the detectors names."""
    module, _, function = named.partition(":")
    return getattr(importlib.import_module(f"safety_neurons.detectors.{module}"), function)


METHODS: dict[str, type[Method]] = {}
"""Every method by name."""


Registered = TypeVar("Registered", bound=type[Method])


@well_typed
def register(method: Registered) -> Registered:
    """Make a method known by its `NAME`: to `find`, to `compare`, and to their help.

    Raises:
        UsageError: another method has the name.
    """
    if METHODS.setdefault(method.NAME, method) is not method:
        raise UsageError(f"a method {method.NAME!r} is registered already; expected another name")
    return method


@functools.cache
def installed() -> None:
    """Register the methods of installed packages, which name their modules as entry points of
    `safety_neurons.methods`.
    """
    for entry in importlib.metadata.entry_points(group="safety_neurons.methods"):
        entry.load()


def by_name(name: str) -> type[Method]:
    """The method of a name.

    Raises:
        UsageError: there is none.
    """
    if name not in METHODS:
        installed()
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}; expected some of {', '.join(METHODS)}")
    return METHODS[name]


def with_options(name: str, **options: Any) -> Method:
    """The method of a name with those of some options that it has.

    Raises:
        UsageError: there is no such method.
    """
    kind = by_name(name)
    own = {one.name for one in kind.options()}
    return kind(**{option: value for option, value in options.items() if option in own})


Positions = Annotated[str, OneOf("completion", "completion-predicting", "prompt", "prompt-last")]


@dataclasses.dataclass(frozen=True)
class ReadOptions(Declaration):
    """What text is read, and which of its positions count."""

    PANEL: ClassVar[str | None] = "Prompts"

    positions: Positions = "completion"
    """completion, completion-predicting, prompt or prompt-last."""
    max_new_tokens: Positive = 128
    """Length of a completion, in tokens."""


@dataclasses.dataclass(frozen=True)
class TextOptions(ReadOptions):
    """What text the two models read."""

    PANEL: ClassVar[str | None] = ReadOptions.PANEL

    generate_with: Annotated[str, OneOf("base", "aligned")] = "base"
    """Which model writes the completions: base or aligned."""


@register
@dataclasses.dataclass(frozen=True)
class Mask(Method, Sized):
    """Learned mask: the set of a given size that refuses the most when it is moved from base to aligned.

    The state s starts as the mean gradient along the straight path (attribution). In every round the units of
    the largest s are moved whole, the value is differentiated there, and s ← keep·s + (1 − keep)·gradient.
    The set of the highest value met is the result. The value: `aim`, mean over prompts, plus `caution` times
    the mean log-probability of the base's own answers to harmless prompts. Scores: s, scaled into [−1, 1],
    and 2 added for the members of the set.

    Raises InputError: both models complete every prompt with the same text, or with none.

    Source: iterative hard thresholding (Blumensath and Davies 2009) on the mask of attribution patching
    (Nanda 2023). Differs: the mask is a set in every round, so that nothing is rounded at the end; no
    relaxation or penalty is tuned.
    """

    NAME, PAIR, HARMLESS, SCORER = "mask", True, "optional", "mask:score"
    PANEL: ClassVar[str | None] = None
    DEFAULT_TOP = 0.02
    DEFAULT_SITES = ("down",)
    WRITES = 16

    move: Annotated[str, OneOf("auto", "activations", "parameters")] = "auto"
    """activations (patching), parameters (swapping), or auto."""
    aim: Annotated[str, OneOf("refusal", "odds")] = "refusal"
    """refusal: log-probability of going on as refusals do where the models part; odds: of the two
    tokens there.
    """
    units: Positive | None = None
    """Size of the set in units, each counted once; without --top and --count."""
    rounds: Positive = 30
    """How often the set is looked at."""
    keep: Annotated[float | int, Between(0, 1, below=True)] = 0.8
    """Share of the state that a round leaves."""
    caution: Annotated[float | int, Between(0)] = 0.5
    """Weight of the harmless answers."""

    def passes(self, heads: float | int) -> float | int:  # noqa: ARG002
        """Forward and back in every round."""
        return 3 * self.rounds

    def check(self) -> None:
        """Also that the size is given once."""
        super().check()
        if self.units is not None and (self.top is not None or self.count is not None):
            raise UsageError(f"--units {self.units}: expected neither --top nor --count beside it")

    def config(self, run: Any) -> dict[str, Any]:
        """Without the size, which the search adds as it was found."""
        own = {name: getattr(self, name) for name in ("move", "aim", "rounds", "keep", "caution")}
        return (
            own
            | {"harmless_sha256": run.harmless.sha256 if run.harmless is not None else ""}
            | self.searched_config()
        )


@register
@dataclasses.dataclass(frozen=True)
class Importance(Method, Voted):
    """Paper 1: how much each row or column changes its sub-layer's output on harmful requests.

    L2 norm of the change of the sub-layer's output when the neuron's parameters are zero, mean over prompts,
    exact. One forward pass without the output head; scores are computed inside it in closed form, for every
    prompt with its exact length. Memory does not grow with the number of prompts.

    Raises UnsupportedModelError: a site that this model does not have, or an attention formula that cannot be
    proved.

    Source: Zhao et al. (ICLR 2025), eq. 1-9 and 11-14. Differs: norms are of the sub-layer's output for all
    sites (the paper leaves q and k in probability space, one threshold for all); heads, rotary embedding,
    mask, biases, norms and soft-caps are exact; o and gate are scored; the score of a prompt sums over all
    tokens fed, special ones included; a set is chosen from the mean over prompts unless an agreement asks for
    the paper's intersection.
    """

    NAME, SCORER, READER = "importance", "importance:score", "importance:reading_by"
    PANEL: ClassVar[str | None] = None
    DEFAULT_TOP = 0.01

    space: Annotated[str, OneOf("output", "probability")] = "output"
    """output, or probability for the paper's literal Q and K scores."""
    as_published: bool = False
    """Compute what the public code computes."""
    memory_budget: Positive = 256
    """Memory of one chunk of neurons, in MiB."""

    def config(self, run: Any) -> dict[str, Any]:
        """Without the memory, which changes nothing."""
        return {name: value for name, value in super().config(run).items() if name != "memory_budget"}

    @property
    def searched(self) -> tuple[str, ...]:
        """Without the site that the public code does not score, so that a share of a prompt's neurons means
        those that have a score.
        """
        return tuple(site for site in super().searched if not (self.as_published and site == "gate"))


@register
@dataclasses.dataclass(frozen=True)
class ImportanceContrast(TextOptions, Method, Voted):
    """Exact importance against the base model's parameters instead of against zero.

    How much a neuron's sub-layer changes when its parameters in the aligned model are set to the base
    model's: L2 norm over the tokens that count and all output dimensions of the sub-layer, mean over prompts.
    A `gate` row, its `up` row and its `down` column are swapped together and share the score; so do a `v` row
    and the `o` columns it feeds. `q` and `k` rows are alone. `absolute` (aligned − base), `relative` (over
    their sum) and `same-input` (on the aligned stream) are differences of importance against zero, every
    neuron alone; `swap-attribution` is the method of that name.

    Raises UnsupportedModelError: routed experts, or an attention formula not proved.

    Source: importance of Zhao et al. (ICLR 2025) between the models of Chen et al. (arXiv 2406.14144).
    Differs: neither paper compares parameters on one stream.
    """

    NAME, PAIR, COMPLETIONS, SCORER = "importance-contrast", True, True, "importance_contrast:score"
    ROUTED = SHARED = False
    PANEL: ClassVar[str | None] = None

    compare: Annotated[str, OneOf("swap", "swap-attribution", "absolute", "relative", "same-input")] = "swap"
    """swap, swap-attribution, absolute, relative or same-input."""
    positions: Positions = "prompt"

    def check(self) -> None:
        """Also that nothing is given which would have no effect."""
        super().check()
        if self.compare == "swap-attribution" and self.positions != "prompt":
            raise UsageError(
                "swap-attribution explains both models' own completions: leave positions at 'prompt'"
            )

    def config(self, run: Any) -> dict[str, Any]:
        """The comparison and the text."""
        text = (
            {"midpoints": SwapAttribution.MIDPOINTS}
            if self.compare == "swap-attribution"
            else run.text_config()
        )
        return {"compare": self.compare} | text | self.searched_config()


@dataclasses.dataclass(frozen=True)
class EarlyStop(Declaration):
    """When the points of a path are enough."""

    settle: Annotated[float | int, Between(0, 1, below=True)] = 0
    """Leave out points of the path once they change no more than this share of a batch's set; 0: none."""

    def settling(self) -> dict[str, Any]:
        """As it stands in the provenance, where points may be left out."""
        return {"settle": self.settle} if self.settle else {}


@register
@dataclasses.dataclass(frozen=True)
class SwapAttribution(Method, EarlyStop, Voted):
    """First-order effect on the refusal of swapping each unit's parameters from base to aligned.

    Gradient of the refusal's log-odds with respect to a soft swap of every unit's parameters, averaged along
    the path. The log-odds are log p(refusal) − log p(compliance) at the first token where the aligned model's
    greedy completion (refusal) and the base model's (compliance) part. Positive: the aligned parameters push
    towards refusal.

    Raises InputError: both models complete every prompt with the same text, or with none.

    Source: the swap of importance-contrast, differentiated as in attribution patching (Nanda 2023).
    Differs: parameters are moved, not activations, and the score is read at one token.
    """

    NAME, PAIR, SCORER = "swap-attribution", True, "importance_contrast:score_swap_attribution"
    ROUTED = SHARED = False
    PANEL: ClassVar[str | None] = None
    MIDPOINTS: ClassVar[int] = 8
    """Points of the path at which the gradient is taken."""
    WRITES, PASSES = 16, 3 * MIDPOINTS

    def config(self, run: Any) -> dict[str, Any]:  # noqa: ARG002
        """With the number of points of the path."""
        return {"midpoints": self.MIDPOINTS} | self.searched_config() | self.settling()


@register
@dataclasses.dataclass(frozen=True)
class Contrast(TextOptions, Method, Voted):
    """Paper 2: root mean square difference of each activation between two models on the same text.

    One model writes greedy completions; then both read the same ids once, and per neuron Σd², Σa, Σa² and the
    token count are kept. No layer is left out silently.

    Source: Chen et al. (arXiv 2406.14144), eq. 3 and section 3.1. Differs: completion tokens keep the ids
    that were generated (the public code re-tokenises decoded text); sums stream in O(neurons) memory; the
    layer range is explicit (the paper leaves the last layer out, the public code by a name filter that fits
    32 layers only).
    """

    NAME, PAIR, COMPLETIONS, SCORER = "contrast", True, True, "contrast:score"
    DEFAULT_SITES = ("down",)
    STATISTICS = 10

    def config(self, run: Any) -> dict[str, Any]:
        """The text."""
        return run.text_config() | self.searched_config()


@dataclasses.dataclass(frozen=True)
class ExplainedTexts(Declaration):
    """Texts whose log-odds are explained: mean log p(refusal) − mean log p(compliance)."""

    refusal: str | Sequence[str] | None = None
    """Text of a refusal. [default: built in]"""
    compliance: str | Sequence[str] | None = None
    """Text of a compliance. [default: built in]"""

    REFUSALS: ClassVar[tuple[str, ...]] = (
        "I'm sorry, but I can't help with that.",
        "I cannot help with this request.",
    )
    COMPLIANCES: ClassVar[tuple[str, ...]] = (
        "Sure, here is what you asked for.",
        "Of course, here is how to do it.",
    )

    @property
    def texts(self) -> dict[str, list[str]]:
        """The refusals and the compliances, several of which are averaged."""
        given = {"refusal": self.refusal or self.REFUSALS, "compliance": self.compliance or self.COMPLIANCES}
        return {name: [texts] if isinstance(texts, str) else list(texts) for name, texts in given.items()}


@register
@dataclasses.dataclass(frozen=True)
class Attribution(Method, ExplainedTexts, Voted):
    """First-order effect of each neuron on the log-odds of refusing: activation times gradient.

    Σ over tokens of activation × gradient of mean log p(refusal) − mean log p(compliance), mean over prompts
    (positive: refusal). One forward and one backward pass give every neuron of every site.

    Raises InputError: a text without tokens.

    Source: gradient × activation and its path integral (Sundararajan et al. 2017), on the score that this
    project defines. Differs: the integral scales all searched activations together, so that the attributions
    of all neurons sum to the score's change between everything deactivated and nothing.
    """

    NAME, SCORER = "attribution", "attribution:score_attribution"
    PANEL: ClassVar[str | None] = None
    DEFAULT_TOP = 0.01

    integrated: Annotated[int, Between(0)] = 0
    """Points at which the gradient is averaged; 0 takes it at the model itself."""

    def passes(self, heads: float | int) -> float | int:  # noqa: ARG002
        """Forward and back at every point."""
        return 3 * max(1, self.integrated)

    def config(self, run: Any) -> dict[str, Any]:
        """The texts as they are used."""
        return super().config(run) | self.texts


@register
@dataclasses.dataclass(frozen=True)
class Relp(Method, ExplainedTexts, Voted):
    """Relevance propagation: activation times relevance rule in place of the gradient, one model.

    The score of attribution, its gradient taken by the rules of layer-wise relevance propagation: the scale
    of a norm is a constant; an activation function f is the line through 0 and f(x); of a gated product each
    factor gets half; the attention pattern is a constant, so that `q` and `k` score 0. Relevance is neither
    made nor lost from the logits down to the first layer, except by biases. A soft-cap on the logits belongs
    to the score.

    Raises UnsupportedModelError: routed experts, an attention, norm or feed-forward part whose formula is not
    proved, an output gate, an activation function that is not 0 at 0.

    Source: RelP (Jafari et al., arXiv 2508.21258), with the rules of AttnLRP (Achtibat et al., ICML 2024).
    Differs: relevance of the activation itself (towards 0) on one prompt, not of the change between two; the
    score is the log-odds of whole texts.
    """

    NAME, SCORER = "relp", "relevance:score"
    PANEL: ClassVar[str | None] = None
    DEFAULT_TOP = 0.01
    DEFAULT_SITES = ("v", "o", "gate", "up", "down")
    PASSES = 3

    def check(self) -> None:
        """Also that a site is searched which relevance passes."""
        super().check()
        if not set(self.searched) - {"q", "k"}:
            raise UsageError(
                f"--sites {','.join(self.searched)}: no relevance passes through the attention pattern; "
                "expected some of v,o,gate,up,down"
            )

    def unfit(self, keys: Collection[str]) -> str:
        """With routed experts anywhere: relevance passes through every layer."""
        expert = next((key for key in keys if ".experts." in key), None)
        return (
            ""
            if expert is None
            else f"relp has rules for dense layers of attention and feed-forward, and {expert} is a routed "
            "expert's; use attribution"
        )

    def config(self, run: Any) -> dict[str, Any]:
        """The texts as they are used."""
        return super().config(run) | self.texts


@register
@dataclasses.dataclass(frozen=True)
class AttributionPatching(Method, EarlyStop, Voted):
    """First-order estimate of what patching each neuron from the aligned model would do.

    Gradient of the explained score with respect to a soft mask m in `base + m·(aligned − base)`, mean over
    prompts. The score is mean log p(refusal) − mean log p(compliance) over the first 16 tokens,
    teacher-forced in the base model; refusal is the aligned model's own greedy completion of the prompt,
    compliance the base model's. Positive pushes towards refusal.

    Raises InputError: both models complete every prompt with the same text, or with none.

    Source: attribution patching (Nanda 2023; Syed et al. 2023) with the path average of integrated gradients
    (Sundararajan 2017). Differs: the activation that is moved is the running one, as in patching during
    generation: earlier neurons' moves reach it.
    """

    NAME, PAIR, SCORER = "attribution-patching", True, "attribution:score_patching"
    PANEL: ClassVar[str | None] = None
    DEFAULT_SITES = ("down",)
    WRITES = 16

    at: Annotated[str, OneOf("path", "base")] = "path"
    """path: averaged from base to aligned; base: at the base model alone."""
    midpoints: Positive = 8
    """Midpoints of the path."""

    def passes(self, heads: float | int) -> float | int:  # noqa: ARG002
        """Forward and back at every point."""
        return 3 * (self.midpoints if self.at == "path" else 1)

    def config(self, run: Any) -> dict[str, Any]:  # noqa: ARG002
        """No midpoints where there is no path."""
        return (
            {
                "at": self.at,
                "midpoints": self.midpoints if self.at == "path" else 0,
            }
            | self.searched_config()
            | self.settling()
        )


@dataclasses.dataclass(frozen=True)
class SetDifference(Method, Ranked):
    """Weights among the largest on the model's answers to harmful requests and not on those to harmless ones
    (Wei et al.).

    Both texts give every weight an importance; a neuron's score is the share of its weights in the set
    difference. The text is the model's own answers, the first 16 tokens of each. Importances of both texts
    (two numbers per weight) are held in memory.
    """

    PANEL: ClassVar[str | None] = None
    HARMLESS = "needed"
    ROUTED = False
    WRITES = 16

    safety: Annotated[float | int, Between(0, 1, above=True, below=True)] = 0.05
    """Share of each matrix's weights that counts as important on harmful requests."""
    utility: Annotated[float | int, Between(0, 1, above=True, below=True)] = 0.05
    """Share of each matrix's weights that counts as important on harmless ones."""


@register
@dataclasses.dataclass(frozen=True)
class Snip(SetDifference):
    """SNIP set difference: weights whose change would alter the loss of refusals and not that of harmless
    answers.

    |weight × gradient of the loss of the model's own answer|, mean over prompts; then the set difference.

    Source: Wei et al. (ICML 2024, arXiv 2402.05162), sections 3.1 and 3.3; SNIP: Lee et al. (ICLR 2019).
    Differs: they take single weights away; here a neuron's score is the share of its weights in the set
    difference.
    """

    NAME, SCORER = "snip", "baselines:snip"
    PASSES = 3


@register
@dataclasses.dataclass(frozen=True)
class Wanda(SetDifference):
    """Wanda set difference: large weights on features that are large while refusing and not in harmless
    answers.

    |weight| × root mean square over answers of the norm of its input feature over an answer's tokens; then
    the set difference.

    Source: Wei et al. (ICML 2024, arXiv 2402.05162), sections 3.1 and 3.3; Wanda: Sun et al. (ICLR 2024).
    Differs: a neuron's score is the share of its weights in the set difference; as in Wei et al. the largest
    weights are taken of the whole matrix (Wanda itself compares within one output).
    """

    NAME, SCORER = "wanda", "baselines:wanda"


@register
@dataclasses.dataclass(frozen=True)
class RefusalDirection(Method, Ranked):
    """What each neuron writes along the refusal direction, harmful minus harmless requests, at the prompt's
    last token.

    The direction is the difference of the mean residual streams after a layer. An `o` or `down` neuron writes
    its activation times its column; a `v` row what the `o` columns it feeds write, `gate` and `up` rows what
    their `down` column writes; `q` and `k` rows write nothing and score 0. Over all writers up to the layer
    (no norm behind them), contributions add up to the length of the difference, less what the embedding
    brings.

    Source: Arditi et al. (arXiv 2406.11717), section 2.3, the difference of means. Differs: the layer is
    chosen by separation instead of by trying every direction's ablation; the projection on neurons is ours.
    """

    NAME, HARMLESS, SCORER = "refusal-direction", "needed", "baselines:score_direction"
    ROUTED = False
    PANEL: ClassVar[str | None] = None
    DEFAULT_SITES = ("down",)

    layer: int | None = None
    """Layer whose output the direction is taken from.

    [default: where the two kinds of prompts differ most, of the first 80 %]
    """


@dataclasses.dataclass(frozen=True)
class BySign(Declaration):
    """Which direction of a difference counts."""

    sign: Annotated[str, OneOf("both", "harmful", "harmless")] = "both"
    """both: by size, whatever the sign; harmful or harmless: what is larger on those prompts."""


@register
@dataclasses.dataclass(frozen=True)
class Cna(Method, BySign, Ranked):
    """Contrastive neuron attribution: mean activation at the prompt's last token, harmful minus harmless.

    The score is the size of the difference. Universal units, which are among the most active of their layer
    on most general prompts, are left out: their score is 0. How many they are, and of which sign the chosen
    ones are, is noted.

    Source: contrastive neuron attribution (arXiv 2605.12290, and its code, NousResearch/neural-steering).
    Differs: the general prompts are put through the model's template like all others; a small layer has at
    most a tenth of its units among the most active, or a model of few units would lose them all.
    """

    NAME, HARMLESS, GENERAL, SCORER = "cna", "needed", "needed", "cna:score"
    PANEL: ClassVar[str | None] = None
    DEFAULT_TOP = 0.001
    DEFAULT_SITES = ("down",)

    most_active: Count = 50
    """Units of a layer that are its most active on a prompt, at most a tenth of it; 0 leaves none out."""
    universal: Share = 0.8
    """Share of the general prompts from which on a unit that is among them is universal."""


@register
@dataclasses.dataclass(frozen=True)
class EffectSize(Method, BySign, ReadOptions, Ranked):
    """Cohen's d of each neuron's activation between harmful and harmless prompts.

    Difference of the means over prompts, divided by the pooled standard deviation (n − 1); the score is its
    size. A prompt's activation is the mean over the positions that count: its last token, all its tokens, or
    those of the model's own greedy answer. One pass; sums are in float64, whatever the number of prompts.

    Raises InputError: fewer than two prompts of a kind.

    Source: effect size of SafeNeuron (Wang et al., arXiv 2602.12158), its activation effect score. Differs:
    a standard deviation below 1e-5 of the neuron's root mean square is rounding and counts as that.
    """

    NAME, HARMLESS, SCORER = "effect-size", "needed", "effect_size:score"
    PANEL: ClassVar[str | None] = None
    DEFAULT_SITES = ("down",)

    positions: Positions = "prompt-last"


@register
@dataclasses.dataclass(frozen=True)
class SafetyHeads(Method, WholeParts):
    """Safety heads: how far the next token's distribution moves on harmful prompts without one head.

    KL(as it is ‖ without the head) of the token that follows the prompt, mean over prompts: one pass a head,
    from its layer on. A head is taken away by zeroing what it gives to the output projection, at every token;
    keys and values of its group stay as they are. The `o` neurons of a head have its score, other sites 0.
    Without a rule whole heads are kept, 5 % of them.

    Source: Ships (Zhou et al., ICLR 2025, arXiv 2410.13708), section 3.2, with its "scaling contribution".
    Differs: zeros at the output projection, so that heads which share keys and values are taken away one by
    one; over several prompts the mean divergence, not the rotation of a subspace of hidden states.
    """

    NAME, SCORER, PART = "heads", "heads:score", "head"
    PANEL: ClassVar[str | None] = None
    DEFAULT_SITES = ("o",)

    def passes(self, heads: float | int) -> float | int:
        """Once whole, and from the layer of every head on."""
        return 1 + heads

    heads: Positive | None = None
    """Keep this many whole heads. [default: 5 % of them]"""

    def unfit(self, keys: Collection[str]) -> str:
        """Without an `o` site."""
        if "o" in self.searched and any(key.endswith(".o") for key in keys):
            return ""
        return f"heads scores o neurons, of which --sites {','.join(self.searched)} has none in this model"


@register
@dataclasses.dataclass(frozen=True)
class RoutingContrast(Method, BySign, ReadOptions, WholeParts):
    """How much more often the router of a mixture chooses an expert on harmful than on harmless prompts.

    Share of a prompt's choices (tokens times experts a token) that fall on the expert, at its last token, at
    all its tokens or over the model's own greedy answer; mean over harmful prompts minus mean over harmless
    ones. All neurons of an expert have its score. Without a rule whole experts are kept, 5 % of them.

    Raises UnsupportedModelError: a model without routed experts.

    Source: the difference of routing frequencies of SteerMoE (arXiv 2509.09660); SAFEx (arXiv 2506.17368)
    counts the same. Differs: every prompt counts alike, whatever its number of tokens; shares of the choices,
    which add up to 1 over the experts of a layer.
    """

    NAME, HARMLESS, SCORER, PART = "routing", "needed", "routing:score", "expert"
    PANEL: ClassVar[str | None] = None
    DEFAULT_SITES = ("down",)

    sign: Annotated[str, OneOf("both", "harmful", "harmless")] = "harmful"
    """harmful or harmless: experts chosen more often on those prompts; both: by size, whatever the sign."""
    positions: Positions = "prompt-last"
    """prompt-last, prompt, completion or completion-predicting."""
    experts: Positive | None = None
    """Keep this many whole experts. [default: 5 % of them]"""

    def unfit(self, keys: Collection[str]) -> str:
        """Without routed experts at a searched site."""
        if any(".experts." in key and key.rpartition(".")[2] in self.searched for key in keys):
            return ""
        return (
            f"routing counts how often experts are chosen, and this model has no routed experts at --sites "
            f"{','.join(self.searched)}; expected a mixture of experts"
        )


@register
@dataclasses.dataclass(frozen=True)
class SparseProbe(Method, BySign, Ranked):
    """How much a sparse linear classifier of harmful against harmless prompts leans on each neuron.

    One logistic regression with an L1 penalty for every site of every layer, on standardised activations
    (pooled over a prompt's tokens), both kinds of prompts counted alike. The score is the size of the weight.
    The penalty is the one of the smallest log loss in cross-validation over prompts; prompts of a group are
    never on both sides. A neuron without a weight scores a little below 0, the less the nearer it is to
    getting one.

    Raises InputError: fewer than two groups of a kind. UnsupportedModelError: routed experts.

    Source: the neurons of sparse probes, in SIREN (arXiv 2604.18519) and H-neurons (Gao et al., arXiv
    2512.01797). Differs: features are activations (H-neurons: a neuron's share of the sub-layer's output),
    the penalty is chosen for every layer by itself.
    """

    NAME, HARMLESS, SCORER = "probe", "needed", "probe:score_sparse"
    ROUTED = False
    PANEL: ClassVar[str | None] = None
    DEFAULT_TOP = 0.005
    DEFAULT_SITES = ("down",)

    pool: Annotated[str, OneOf("mean", "last", "largest")] = "mean"
    """What a prompt's activation is: the mean over its tokens, the last, or the largest."""
    folds: Annotated[int, Between(2)] = 5
    """Parts of the cross-validation, at most as many as there are groups of prompts of a kind."""
    strength: Annotated[float | int, Between(0, above=True)] | None = None
    """Inverse of the penalty, C. [default: by cross-validation]"""


@register
@dataclasses.dataclass(frozen=True)
class ProbeWeights(Method, Ranked):
    """How much a linear classifier of harmful against harmless requests leans on each neuron.

    |z-score| of each neuron's weight in a logistic regression, with the sign of the weight. There is one
    regression per site of each layer; its features are the activations, the largest over a prompt's tokens,
    standardised; the z-score is over the site's neurons. Positive: fires for harmful requests.

    Raises UnsupportedModelError: routed experts at the searched sites.

    Source: NeuroStrike (Wu et al., NDSS 2026, arXiv 2509.11864), the probe of safety neurons: positive probe
    weights with |z| above 3, on the outputs of the gate and up projections. Differs: features are
    standardised and the penalty is fixed, so that the probe has one solution; any site can be searched.
    """

    NAME, HARMLESS, SCORER = "probe-weights", "needed", "probe:score_weights"
    ROUTED = False
    DEFAULT_SITES = ("gate", "up")
    PENALTY: ClassVar[float] = 1.0
    """Weight of the squared norm: half of it is added to the summed loss, as C = 1 does in common
    libraries.
    """

    def config(self, run: Any) -> dict[str, Any]:
        """With the penalty."""
        return self.searched_config() | {"penalty": self.PENALTY, "harmless_sha256": run.harmless.sha256}


@register
@dataclasses.dataclass(frozen=True)
class WeightChange(Method, Ranked):
    """L2 norm of the change of each neuron's parameters between two models: its row and bias entry, or its
    column.

    Adapters count with what they do to the parameters: a LoRA with its product, an (IA)³ scale on what a
    projection reads as a scale of its columns.

    Source: the plain weight difference, the baseline that planted decoys are made to fool.
    Differs: the bias entry of a row belongs to its neuron.
    """

    NAME, PAIR, PROMPTS, SCORER = "weight-change", True, False, "baselines:change"


@register
@dataclasses.dataclass(frozen=True)
class WeightMagnitude(Method, Ranked):
    """L2 norm of each neuron's parameters in one model: its row and bias entry, or its column.

    Source: magnitude, the usual baseline of pruning.
    """

    NAME, PROMPTS, SCORER = "weight-magnitude", False, "baselines:magnitude"


@register
@dataclasses.dataclass(frozen=True)
class ActivationMagnitude(Method, Ranked):
    """Root mean square of each neuron's activation over all tokens of the prompts; an expert's over
    the tokens routed to it.

    Source: activation size, the usual baseline of pruning.
    """

    NAME, SCORER = "activation-magnitude", "baselines:activations"
