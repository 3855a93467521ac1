"""The small table: what model families call their projections, and how they fuse them. Nothing here names a family."""

from safety_neurons.model.layouts import Layout

ATTENTION_ROLES: dict[str, tuple[str, ...]] = {
    "q": ("q_proj", "query", "wq", "q_lin", "query_proj", "to_q"),
    "k": ("k_proj", "key", "wk", "k_lin", "key_proj", "to_k"),
    "v": ("v_proj", "value", "wv", "v_lin", "value_proj", "to_v"),
    "qkv": ("query_key_value", "qkv_proj", "c_attn", "Wqkv", "qkv", "W_pack", "in_proj_qkv", "wqkv", "att_proj"),
    "o": ("o_proj", "out_proj", "dense", "c_proj", "wo", "out_lin", "attn_out", "output_proj"),
}
"""Names of projections inside an attention module, by role."""

MLP_ROLES: dict[str, tuple[str, ...]] = {
    "gate": ("gate_proj", "w1", "gate", "linear_v", "ff_gate"),
    "up": ("up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "w3", "up", "lin1", "ff_proj"),
    "gate_up": ("gate_up_proj", "gate_and_up_proj", "w13", "dense_h_to_4h_gated"),
    "down": ("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "w2", "down", "lin2", "ff_out"),
}
"""Names of projections inside a feed-forward module, by role."""

FUSED_LAYOUTS: dict[str, Layout] = {"query_key_value": Layout.GROUPED}
"""First guess for a fused projection by its name; every other name starts as contiguous, and the proof has the last word."""

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


SAY_SITES = (
    "the command line has no option for that; in Python say where they are: "
    "model.anatomy = prove(resolve(model.model, sites={'q': PATH, …})), of safety_neurons.model.anatomy"
)
"""What to do about a site whose place cannot be told."""
