"""Between ``TransformerLayer`` and torch's encoder and decoder layers, whose parameters have the same names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from layerdrop_fast.nn.transformer_layer import TransformerLayer

TORCH_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def from_torch(cls: type[TransformerLayer], layer: nn.Module) -> TransformerLayer:
    """See ``TransformerLayer.from_torch``."""
    if type(layer) not in TORCH_LAYERS:  # a subclass may compute something else
        raise TypeError(
            f"got a {type(layer).__name__}, expected an nn.TransformerEncoderLayer or TransformerDecoderLayer"
        )
    assert isinstance(layer, TORCH_LAYERS)
    attention, cross = layer.self_attn, isinstance(layer, nn.TransformerDecoderLayer)
    branches = 3 if cross else 2
    norms = [getattr(layer, f"norm{number}") for number in range(1, branches + 1)]
    if any(type(norm) is not nn.LayerNorm for norm in norms):
        raise ValueError(f"got the norms {[type(norm).__name__ for norm in norms]}, expected LayerNorm alone")
    rates = _only("dropout behind the branches", [_rate(layer, f"dropout{n}") for n in range(1, branches + 1)])
    attentions = [attention, layer.multihead_attn] if isinstance(layer, nn.TransformerDecoderLayer) else [attention]
    for part in attentions:
        if not part.batch_first:
            raise ValueError("attention takes [S, B, D] (batch_first=False), expected [B, S, D], batch_first=True")
        if part.add_zero_attn:
            raise ValueError("attention adds zeros to its keys (add_zero_attn=True), expected add_zero_attn=False")
    with torch.device("meta"):
        made = cls(
            attention.embed_dim,
            attention.num_heads,
            layer.linear1.out_features,
            rates,
            _activation(layer.activation),
            norms[0].eps,
            layer.norm_first,
            attention.in_proj_bias is not None,
            attention_dropout=_only("dropout of attention weights", [part.dropout for part in attentions]),
            activation_dropout=_rate(layer, "dropout"),
            cross_attention=cross,
        )
    for number, norm in enumerate(norms, 1):
        getattr(made, f"norm{number}").eps = norm.eps
    share(made, layer)
    return made.train(layer.training)


def to_torch(layer: TransformerLayer) -> nn.TransformerEncoderLayer | nn.TransformerDecoderLayer:
    """See ``TransformerLayer.to_torch``."""
    ours = {
        "norm": layer.norm,
        "activation": layer.activation,
        "num_kv_heads": layer.self_attn.num_kv_heads,
        "head_dim": layer.self_attn.head_dim,
        "rope_theta": layer.rope_theta,
        "layer_scale": layer.layer_scale1 is not None,
    }
    expected = ours | {
        "norm": "layernorm",
        "num_kv_heads": layer.self_attn.nhead,
        "head_dim": layer.d_model / layer.self_attn.nhead,  # fewer heads than that were pruned
        "rope_theta": None,
        "layer_scale": False,
    }
    activations: dict[str, Any] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "gelu_tanh": nn.GELU("tanh")}
    if ours != expected or layer.activation not in activations:
        wanted = expected | {"activation": " or ".join(activations)}
        raise ValueError(f"torch's layers can't compute this: got {ours}, expected {wanted}")
    kind = nn.TransformerEncoderLayer if layer.multihead_attn is None else nn.TransformerDecoderLayer
    made = kind(
        layer.d_model,
        layer.self_attn.nhead,
        layer.dim_feedforward,
        layer.dropout,
        activations[layer.activation],
        layer.eps,
        batch_first=True,
        norm_first=layer.norm_first,
        bias=layer.linear1.bias is not None,
        device="meta",
    )
    made.dropout.p = layer.activation_dropout
    made.self_attn.dropout = layer.self_attn.dropout
    if isinstance(made, nn.TransformerDecoderLayer):
        made.multihead_attn.dropout = layer.self_attn.dropout
    for number in range(1, layer.num_branches + 1):
        getattr(made, f"norm{number}").eps = getattr(layer, f"norm{number}").eps
    share(made, layer)
    return made.train(layer.training)


def share(to: nn.Module, source: nn.Module) -> None:
    """Gives ``to`` the parameters of ``source``, which have the same names and shapes."""
    parameters = dict(source.named_parameters())
    for name, own in list(to.named_parameters()):
        owner, _, last = name.rpartition(".")
        if name not in parameters or own.shape != parameters[name].shape:
            got = list(parameters[name].shape) if name in parameters else "none"
            raise ValueError(f"{name}: got {got}, expected {list(own.shape)}")
        setattr(to.get_submodule(owner), last, parameters.pop(name))
    if parameters:
        raise ValueError(f"got the parameters {sorted(parameters)} too, which have no counterpart")


def _rate(layer: nn.Module, name: str) -> float:
    dropout = getattr(layer, name)
    if type(dropout) is not nn.Dropout:
        raise ValueError(f"{name}: got a {type(dropout).__name__}, expected an nn.Dropout")
    return dropout.p


def _only(what: str, rates: list[float]) -> float:
    if len(set(rates)) != 1:
        raise ValueError(f"{what}: got the rates {rates}, expected one")
    return rates[0]


def _activation(activation: Any) -> str:
    if isinstance(activation, nn.GELU):
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    for name, function, module in (("gelu", F.gelu, ()), ("relu", F.relu, nn.ReLU), ("silu", F.silu, nn.SiLU)):
        if activation is function or isinstance(activation, module):
            return name
    raise ValueError(f"activation: got {activation!r}, expected gelu, relu or silu")
