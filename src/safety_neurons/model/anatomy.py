"""Anatomy: for each layer and site of a causal language model, the module, the axis and the features that are
its neurons.

1. The layers are the one list of modules as long as the configuration says.
2. The linear maps of a layer are grouped by the module that holds them; a small table says which role a name
    stands for.
3. A group with queries, keys and values is the attention; a group with a down projection is the feed-forward
   part, or a shared expert where it lies inside a block with routed experts.
4. Shapes must fit one another: heads from widths, fused projections from the widths of what they feed.

Nothing is matched on the name of a model. What cannot be told is refused by site and by reason, and all of it
is proved on a probe pass (`safety_neurons.model.proof`). A layer of which nothing is known (a recurrent or
convolutional mixer of a hybrid) is such a refusal, and its linear maps are kept by name (`Anatomy.unknown`).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from safety_neurons.errors import NeuronError, UnsupportedModelError, UsageError
from safety_neurons.model.proof import KNOWN_ACTIVATIONS, SAY_SITES, prove
from safety_neurons.model.sites import (
    DOWN,
    FUSED,
    Anatomy,
    AttentionAnatomy,
    ExpertsAnatomy,
    LayerAnatomy,
    Layout,
    MlpAnatomy,
    Projection,
    SitePlace,
    describe_experts,
    is_experts,
    projections_of,
    runs,
    split_gate_up,
    split_gated,
    split_qkv,
    unwrapped,
)
from safety_neurons.neurons import ATTENTION_SITES, MLP_SITES, NeuronSet

__all__ = ["nnsight_paths", "prove", "resolve"]

ATTENTION_ROLES: dict[str, tuple[str, ...]] = {
    "q": ("q_proj", "query", "wq", "q_lin", "query_proj", "to_q"),
    "k": ("k_proj", "key", "wk", "k_lin", "key_proj", "to_k"),
    "v": ("v_proj", "value", "wv", "v_lin", "value_proj", "to_v"),
    "qkv": (
        "query_key_value",
        "qkv_proj",
        "c_attn",
        "Wqkv",
        "qkv",
        "W_pack",
        "in_proj_qkv",
        "wqkv",
        "att_proj",
    ),
    "o": ("o_proj", "out_proj", "dense", "c_proj", "wo", "out_lin", "attn_out", "output_proj"),
}
"""Names of projections inside an attention module, by role."""

MLP_ROLES: dict[str, tuple[str, ...]] = {
    "gate": ("gate_proj", "w1", "gate", "linear_v", "ff_gate"),
    "up": ("up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "w3", "up", "lin1", "ff_proj"),
    "gate_up": ("gate_up_proj", "gate_and_up_proj", "w13", "dense_h_to_4h_gated", "input_linear"),
    "down": (
        "down_proj",
        "c_proj",
        "fc2",
        "fc_out",
        "dense_4h_to_h",
        "w2",
        "down",
        "lin2",
        "ff_out",
        "output_linear",
    ),
}
"""Names of projections inside a feed-forward module, by role."""

FUSED_LAYOUTS: dict[str, Layout] = {"query_key_value": Layout.GROUPED}
"""First guess for a fused projection by its name.

Every other name starts as contiguous, and the proof has the last word.
"""

HEAD_SIZES = ("head_dim", "head_size", "attention_head_size", "d_head")
"""Attributes of an attention module (or fields of the configuration) that hold the size of a head."""

ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation", "act_func", "gelu_impl")
"""Attributes of a feed-forward module, or of the layer, that hold the activation function."""

ROUTERS = ("router", "gate", "wg")
"""Names of linear maps that choose experts; they hold no neurons."""


def role_of(name: str, roles: dict[str, tuple[str, ...]]) -> str | None:
    """The role of a projection from the last part of its path."""
    last = name.rpartition(".")[2]
    return next((role for role, names in roles.items() if last in names), None)


def resolve(
    model: nn.Module, *, sites: Mapping[str, str] | None = None, layouts: Mapping[str, str] | None = None
) -> Anatomy:
    """The anatomy of a decoder-only model, from its structure alone; `proof.prove` then proves it.

    Args:
        model: a transformers causal language model, plain, quantised or wrapped by PEFT.
        sites: paths inside a layer for what the table of names does not know: role (`q k v qkv o gate up
            gate_up down`) to path, such as `{"q": "attention.my_queries"}`. They go before the table.
        layouts: layouts of fused projections, `{"qkv": "grouped"}`, `{"gate_up": "alternating"}`; the proof
            does not replace these.

    Raises:
        UnsupportedModelError: no list of layers, a compiled model, or no layer in which anything is known.
        UsageError: sites that are no mapping of roles to paths, or a path that no layer has.
    """
    _check_sites(sites)
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError(
            "a compiled model arrived, hooks need the plain one; pass model._orig_mod"
        )
    config = unwrapped(model).config.get_text_config()
    chosen = {name: str(Layout(value)) for name, value in (layouts or {}).items()}
    name, stack = _layer_list(model, int(config.num_hidden_layers))
    refused: dict[str, str] = {}
    if absent := [
        path for path in (sites or {}).values() if not any(path in projections_of(layer) for layer in stack)
    ]:
        raise UsageError(
            f"sites: no layer has a linear map at {absent[0]!r}; expected a path inside a layer, such as "
            "self_attn.q_proj"
        )
    layers, total, unknown = [], 0, dict[int, tuple[str, ...]]()
    for number, layer in enumerate(stack):
        builder = _LayerBuilder(number, f"{name}.{number}", layer, config, dict(sites or {}), chosen, refused)
        layers.append(builder.build())
        total += builder.all_parameters
        if builder.unknown:
            unknown[number] = builder.unknown
    _refuse_shared(layers, refused)
    anatomy = Anatomy(model, tuple(layers), refused, total, chosen, unknown)
    if not anatomy.table.keys:
        first, reason = next(iter(refused.items()), ("", f"{name} has no linear maps"))
        where = ".".join(first.split(".")[:2])
        raise UnsupportedModelError(
            f"{anatomy.architecture}: no layer has a part whose neurons can be told; {where}: {reason}"
        )
    return anatomy


def _refuse_shared(layers: list[LayerAnatomy], refused: dict[str, str]) -> None:
    """Refuses the sites of weights that several layers use: what is done to a neuron of one layer is done to
    the others.
    """
    users: dict[int, set[int]] = {}
    for layer in layers:
        for part in layer.parts:
            for place in part.places.values():
                users.setdefault(_weights_of(place), set()).add(layer.index)
    for layer in layers:
        for part in layer.parts:
            for place in part.places.values():
                if len(shared := users[_weights_of(place)]) > 1:
                    refused[place.key] = (
                        f"layers {runs(sorted(shared))} share the weights of {place.module_name}, so that "
                        "its neurons belong to none of them; no option helps for this model"
                    )


def _weights_of(place: SitePlace) -> int:
    """What tells shared weights: the identity of what the model stores. A computed weight (weight norm) is
    another tensor on every access, and its address is soon given to the next one.
    """
    base = place.projection.base
    stored = dict(base.named_parameters(remove_duplicate=False)) | dict(base.named_buffers())
    behind = [value for name, value in stored.items() if name.startswith("parametrizations.weight.")]
    return id(next(iter(behind), stored.get("weight", base)))


def _check_sites(sites: object) -> None:
    roles = (*ATTENTION_ROLES, *MLP_ROLES)
    if sites is None:
        return
    if not isinstance(sites, Mapping):
        raise UsageError(
            f"sites is a {type(sites).__name__}; expected a mapping of roles ({' '.join(roles)}) to "
            "paths inside a layer"
        )
    for role, path in sites.items():
        if role not in roles or not isinstance(path, str):
            raise UsageError(
                f"sites={{{role!r}: {path!r}}}: expected one of {' '.join(roles)} with a path inside a layer"
            )


def _experts_advice(holder: nn.Module) -> str:
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        return (
            f"this is transformers {transformers.__version__}: use transformers 5 or later for "
            "mixture-of-experts models"
        )
    if type(holder).__module__.startswith("transformers."):
        return f"{type(holder).__name__} keeps them so and is not supported; use another model"
    return (
        "the model's own code keeps them so: load it without --trust-remote-code where transformers has "
        "the architecture, or use another"
    )


def _layer_list(model: nn.Module, n_layers: int) -> tuple[str, nn.ModuleList]:
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    }
    lists = {
        name: module
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    }
    with_maps = {
        name: module for name, module in lists.items() if projections_of(module[0]) or _experts_of(module[0])
    }
    if len(with_maps) > 1 and callable(getattr(unwrapped(model), "get_decoder", None)):
        decoder = {id(module) for module in unwrapped(model).get_decoder().modules()}
        with_maps = {name: module for name, module in with_maps.items() if id(module) in decoder} or with_maps
    if len(with_maps) != 1:
        raise UnsupportedModelError(
            f"{len(with_maps)} lists of {n_layers} layers with linear maps were found "
            f"({', '.join(with_maps) or 'none'}), one was expected; pass the decoder-only language model "
            "itself"
        )
    return next(iter(with_maps.items()))


def _experts_of(layer: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in layer.named_modules() if is_experts(module)}


@dataclass
class _LayerBuilder:
    """Gathers what is known of one layer; `refused` collects sites that are there but cannot be told."""

    number: int
    name: str
    layer: nn.Module
    config: Any
    overrides: dict[str, str]
    layouts: dict[str, str]
    refused: dict[str, str]
    all_parameters: int = 0
    unknown: tuple[str, ...] = ()

    def build(self) -> LayerAnatomy:
        maps = projections_of(self.layer)
        experts_name, experts = self._experts()
        block = experts_name.rpartition(".")[0] if experts_name else None
        routers = [path for path, part in maps.items() if self._is_router(path, part, experts)]
        maps = {path: part for path, part in maps.items() if path not in routers}
        self.all_parameters = sum(part.n_parameters for part in maps.values()) + self._three_dimensional()
        attention_maps, mlp_groups, unknown = self._groups(maps)
        attention = self._attention(attention_maps)
        dense = shared = None
        for parent, group in mlp_groups.items():
            inside = block is not None and (parent == block or parent.startswith(f"{block}.") or block == "")
            part = self._mlp(parent, group, "shared_expert." if inside else "")
            if (shared if inside else dense) is not None:
                self._refuse(
                    MLP_SITES,
                    (
                        f"two feed-forward parts were found ({parent} is the second), one was expected; "
                        f"{SAY_SITES}"
                    ),
                )
            elif inside:
                shared = part
            else:
                dense = part
        self.unknown = tuple(unknown)
        self._account(attention is not None, bool(mlp_groups or experts_name), unknown)
        return LayerAnatomy(self.number, self.name, self.layer, attention, dense, experts, shared)

    def _refuse(self, sites: Any, reason: str, prefix: str = "") -> None:
        for site in sites:
            self.refused.setdefault(f"layers.{self.number}.{prefix}{site}", reason)

    def _account(self, attention: bool, feed_forward: bool, unknown: list[str]) -> None:
        """Refuse the sites of the parts that a layer has and the table does not know.

        One unknown part beside no attention is taken for what stands in its place; a second one, or one
        beside an attention, for the feed-forward part.
        """
        reason = f"{self.name} has linear maps of unknown role ({', '.join(unknown)}); {SAY_SITES}"
        parts = {path.partition(".")[0] if "." in path else "" for path in unknown}
        if unknown and not attention:
            self._refuse(ATTENTION_SITES, reason)
        if unknown and not feed_forward and (attention or len(parts) > 1):
            self._refuse(MLP_SITES, reason)

    def _three_dimensional(self) -> int:
        """Parameters of experts that are no linear maps of their own."""
        return sum(
            parameter.numel()
            for module in _experts_of(self.layer).values()
            for parameter in module.parameters(recurse=False)
        )

    def _is_router(self, path: str, part: Projection, experts: ExpertsAnatomy | None) -> bool:
        last = path.rpartition(".")[2]
        if part.out_features == 1:
            return True
        if experts is None or last not in ROUTERS:
            return False
        return part.out_features == experts.n_experts

    def _experts(self) -> tuple[str, ExpertsAnatomy | None]:
        self._no_listed_experts()
        modules = _experts_of(self.layer)
        if not modules:
            return "", None
        if len(modules) > 1:
            raise UnsupportedModelError(
                f"layers.{self.number}: {len(modules)} experts modules were found ({', '.join(modules)}), "
                "one was expected; use another model"
            )
        name, module = next(iter(modules.items()))
        block = self.layer.get_submodule(name.rpartition(".")[0])
        layout = Layout(given) if (given := self.layouts.get("experts")) else None
        try:
            return name, describe_experts(self.number, f"{self.name}.{name}", module, block, layout)
        except UnsupportedModelError as error:
            gated = getattr(module, "has_gate", True)
            self._refuse(MLP_SITES if gated else ("up", "down"), str(error), "experts.0.")
            return name, None

    def _no_listed_experts(self) -> None:
        for name, module in self.layer.named_modules():
            if (
                isinstance(module, nn.ModuleList)
                and len(module) > 1
                and all(role_of(p, MLP_ROLES) for p in projections_of(module))
            ):
                if not projections_of(module):
                    continue
                raise UnsupportedModelError(
                    f"layers.{self.number}.experts: {len(module)} experts as a list of modules were found "
                    f"({name}), three-dimensional parameters behind the experts interface were expected; "
                    f"{_experts_advice(self.layer.get_submodule(name.rpartition('.')[0]))}"
                )
        three = [
            name
            for name, module in self.layer.named_modules()
            if getattr(getattr(module, FUSED, None), "ndim", 0) == 3
            or getattr(getattr(module, DOWN, None), "ndim", 0) == 3
        ]
        if three and not _experts_of(self.layer):
            raise UnsupportedModelError(
                f"layers.{self.number}.experts: three-dimensional experts without the experts interface "
                f"were found ({three[0]}); {_experts_advice(self.layer.get_submodule(three[0]))}"
            )

    def _groups(
        self, maps: dict[str, Projection]
    ) -> tuple[dict[str, str], dict[str, dict[str, str]], list[str]]:
        """Roles to paths for the attention, the same for every feed-forward group, and the paths of no known
        role.
        """
        forced = {path: role for role, path in self.overrides.items() if path in maps}
        attention = {role: path for path, role in forced.items() if role in ATTENTION_ROLES}
        named = {role: path for path, role in forced.items() if role in MLP_ROLES}
        mlps: dict[str, dict[str, str]] = {}
        if named:
            mlps[named.get("down", next(iter(named.values()))).rpartition(".")[0]] = named
        by_parent: dict[str, list[str]] = {}
        for path in maps:
            if path not in forced:
                by_parent.setdefault(path.rpartition(".")[0], []).append(path)
        holders = {path.rpartition(".")[0] for path in attention.values()}
        unknown: list[str] = []
        for parent, paths in by_parent.items():
            roles = {role_of(path, ATTENTION_ROLES) for path in paths}
            is_attention = parent in holders or bool(roles & {"q", "k", "v", "qkv"})
            group = attention if is_attention else mlps.get(parent, {})
            for path in paths:
                role = role_of(path, ATTENTION_ROLES if is_attention else MLP_ROLES)
                if role is None or role in group:
                    unknown.append(path)
                else:
                    group[role] = path
            if not is_attention and group:
                mlps[parent] = group
        return attention, mlps, unknown

    def _place(self, site: str, path: str, side: str, index: Any = None, prefix: str = "") -> SitePlace:
        part = projections_of(self.layer)[path]
        return SitePlace(f"layers.{self.number}.{prefix}{site}", f"{self.name}.{path}", part, side, index)

    def _attention(self, paths: dict[str, str]) -> AttentionAnatomy | None:
        if not paths:
            return None
        holder = next(paths[role] for role in ("qkv", "q", "k", "v", "o") if role in paths).rpartition(".")[0]
        module = self.layer.get_submodule(holder)
        head = self._head_dim(module)
        if not ("o" in paths and ("qkv" in paths or {"q", "k", "v"} <= set(paths))):
            names = ", ".join(f"{role}: {path}" for role, path in paths.items())
            self._refuse(
                ATTENTION_SITES,
                (
                    f"{self.name} has an incomplete attention ({names}); q, k, v (or qkv) and o were "
                    f"expected: {SAY_SITES}"
                ),
            )
            return None
        output = self._place("o", paths["o"], "input")
        layout, places, n_heads, n_kv_heads = self._queries_keys_values(paths, output, head)
        if places is None:
            return None
        gate = None
        if layout is None and places["q"].features == 2 * output.size:
            queries, gate = split_gated(n_heads, head)
            places["q"] = places["q"].at(queries)
        return AttentionAnatomy(
            module, f"{self.name}.{holder}", n_heads, n_kv_heads, head, {**places, "o": output}, layout, gate
        )

    def _queries_keys_values(
        self, paths: dict[str, str], output: SitePlace, head: int
    ) -> tuple[Layout | None, dict[str, SitePlace] | None, int, int]:
        n_heads = output.size // head
        if "qkv" in paths:
            fused = projections_of(self.layer)[paths["qkv"]]
            n_kv_heads = (fused.out_features // head - n_heads) // 2
            layout = Layout(
                self.layouts.get(
                    "qkv", FUSED_LAYOUTS.get(paths["qkv"].rpartition(".")[2], Layout.CONTIGUOUS)
                ),
            )
            if (
                n_kv_heads < 1
                or (n_heads + 2 * n_kv_heads) * head != fused.out_features
                or n_heads % n_kv_heads
            ):
                self._bad_widths(
                    f"{paths['qkv']} has {fused.out_features} features for {n_heads} heads of {head}"
                )
                return layout, None, 0, 0
            indices = split_qkv(layout, n_heads, n_kv_heads, head)
            return (
                layout,
                {site: self._place(site, paths["qkv"], "output", indices[site]) for site in "qkv"},
                n_heads,
                n_kv_heads,
            )
        places = {site: self._place(site, paths[site], "output") for site in "qkv"}
        n_kv_heads = places["k"].size // head
        widths = {site: place.size for site, place in places.items()}
        queries = (n_heads * head, 2 * n_heads * head)  # twice as many where they bring an output gate
        fits = widths["q"] in queries and widths["k"] == widths["v"] == n_kv_heads * head
        if not fits or n_kv_heads < 1 or n_heads % n_kv_heads:
            self._bad_widths(
                f"q, k, v have {widths} features and o takes {output.size}, with heads of {head}"
            )
            return None, None, 0, 0
        return None, places, n_heads, n_kv_heads

    def _bad_widths(self, names: str) -> None:
        self._refuse(
            ATTENTION_SITES,
            f"{self.name}: {names}, which is no grouped-query attention; no option helps for this model",
        )

    def _head_dim(self, module: nn.Module) -> int:
        for holder in (module, self.config):
            for name in HEAD_SIZES:
                value = getattr(holder, name, None)
                if isinstance(value, int) and value > 0:
                    return value
        return int(self.config.hidden_size) // int(self.config.num_attention_heads)

    def _mlp(self, parent: str, paths: dict[str, str], prefix: str) -> MlpAnatomy | None:
        module = self.layer.get_submodule(parent)
        if "down" not in paths or not ({"up", "gate_up"} & set(paths)):
            names = ", ".join(f"{role}: {path}" for role, path in paths.items())
            self._refuse(
                MLP_SITES if {"gate", "gate_up"} & set(paths) else ("up", "down"),
                f"{self.name} has an incomplete feed-forward part ({names}), down and up (or gate_up) were "
                f"expected: {SAY_SITES}",
                prefix,
            )
            return None
        places, layout = {}, None
        down = self._place("down", paths["down"], "input", prefix=prefix)
        if "gate_up" in paths:
            layout = Layout(self.layouts.get("gate_up", Layout.CONTIGUOUS))
            for site, index in split_gate_up(layout, down.size).items():
                places[site] = self._place(site, paths["gate_up"], "output", index, prefix)
        else:
            places = {
                site: self._place(site, paths[site], "output", prefix=prefix)
                for site in ("gate", "up")
                if site in paths
            }
        features = {place.features // (2 if layout else 1) for place in places.values()}
        if features != {down.size}:
            self._refuse(
                MLP_SITES,
                f"{self.name}: {sorted(features)} neurons feed a down projection of {down.size}",
                prefix,
            )
            return None
        name = f"{self.name}.{parent}" if parent else self.name
        activation = self._activation(module)
        return MlpAnatomy(module, name, "gate" in places, {**places, "down": down}, activation, layout)

    def _activation(self, module: nn.Module) -> Callable[..., Any]:
        """What the module holds; a first guess for the proof where it calls a function of its own."""
        for holder in (module, self.layer):
            for name in ACTIVATIONS:
                value = getattr(holder, name, None)
                if callable(value):
                    return value
        return KNOWN_ACTIVATIONS[0]


def nnsight_paths(anatomy: Anatomy, neurons: NeuronSet) -> dict[str, list[int]]:
    """The same neurons by nnsight path: a projection's `.input` or `.output` and the features of it.

    Raises:
        NeuronError: experts.
    """
    paths: dict[str, list[int]] = {}
    for key, indices in neurons.items():
        if ".experts." in key:
            raise NeuronError(
                f"{key} is an expert's, whose projection is no module of its own; leave experts out"
            )
        place = anatomy.place(key)
        path = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", place.module_name)
        features = np.arange(
            place.projection.out_features if place.side == "output" else place.projection.in_features
        )
        if place.index is not None:
            features = features[place.index if isinstance(place.index, slice) else np.asarray(place.index)]
        name = f"{path}.{place.side}"
        paths[name] = sorted([*paths.get(name, []), *features[indices].tolist()])
    return paths
