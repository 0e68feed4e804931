"""``TransformerLayer``: torch's encoder and decoder layers on the fused ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from layerdrop_fast import ops
from layerdrop_fast._checks import check_choice, check_count, check_rate
from layerdrop_fast.nn import torch_layers
from layerdrop_fast.nn.attention import Attend, Attention, KVCache, attention_mask, linear, rotary_tables
from layerdrop_fast.nn.parts import PartBlocks
from layerdrop_fast.nn.residual import Step, add, add_and_norm
from layerdrop_fast.nn.samples import PutBack
from layerdrop_fast.ops._checks import NORMS
from layerdrop_fast.reference.act_linear import ACTIVATIONS
from layerdrop_fast.reference.rows import accumulator

SITES_PER_BRANCH = 2  # behind the branch, and behind the activation in it


class Visit(NamedTuple):
    """What a stack tells a layer about the step: which of its branches run, for which samples, and what came before."""

    before: Step | None  # how the branch output y, which has not been added yet, is to be added
    steps: Sequence[Step | None]  # of each branch; None: dropped
    attend: Attend
    memory_attend: Attend
    in_place: bool  # the stream is the stack's own, and written in place
    cache: tuple[KVCache, int] | None  # and the number of the layer in it


class TransformerLayer(nn.Module):
    """A Transformer layer that saves 10 units of B * S * D numbers for backward where eager PyTorch saves 18.

    With ``norm_first`` (pre-norm), each branch computes ``x = x + r * dropout(ls * branch(norm(x)))``, without it
    (post-norm) ``x = norm(x + r * dropout(ls * branch(x)))``; r is the residual scale of a stack, ls the layer scale.
    The branches are self-attention, with ``cross_attention`` also attention to ``memory``, and the feed-forward network
    ``linear2(dropout(activation(linear1(.))))``.

    A kept layer saves xhat, query, key, value, the attention's output, xhat and the hidden layer (1 + 3 + 1 + 1 + 4 for
    a hidden layer of 4D), pre-norm; with ``recompute="qkv"`` not query, key and value, for a quarter of the forward
    products once more. Masks and the stream are not saved.

    Shapes:
        x: [B, S, D]; memory: [B, T, D] -> [B, S, D]

    Args:
        d_model: D, a multiple of ``nhead``.
        nhead: query heads.
        dim_feedforward: width of the hidden layer; the width behind the gate for "swiglu".
        dropout: of what a branch adds to the stream.
        activation: "gelu" (by erf), "gelu_tanh", "relu", "silu" or "swiglu".
        layer_norm_eps: of every norm.
        norm_first: pre-norm or post-norm.
        bias: whether linear maps and LayerNorms have biases.
        norm: "layernorm" or "rmsnorm".
        attention_dropout: of attention weights (torch's layers use ``dropout`` there too).
        activation_dropout: behind the activation (torch's layers use ``dropout`` there too).
        num_kv_heads: key and value heads, a divisor of ``nhead``; None: nhead.
        rope_theta: base of rotary positions (10000 in the paper); None: no positions in attention.
        cross_attention: a decoder layer with a branch that attends to ``memory``.
        layer_scale: initial value of a factor for each channel of each branch; None: no factors.
        recompute: None, or "qkv".
        device, dtype: of the parameters.

    Raises:
        ValueError: a value that is not among those above. TypeError: one of another kind.

    The state dict has the names of ``nn.TransformerEncoderLayer``, with cross_attention ``nn.TransformerDecoderLayer``;
    "swiglu" doubles the rows of ``linear1`` (gate, value), grouped heads shorten ``self_attn.in_proj_weight``, and
    ``layer_scale1..`` exist where asked for. Hooks on the linear maps and norms inside do not run, and a module put in
    the place of a linear map is refused (TypeError), parametrizations work. Hooks of the layer run: in a
    TransformerStack they see its stream, and a branch that is still to be added to it.

    Randomness: called alone while training, masks come from four words of torch's generator a call; in a stack from its
    counters. Masks of attention weights are those of ``scaled_dot_product_attention``, from torch's generator.

    Source: Vaswani et al. 2017; Xiong et al. 2020 (pre-norm); Su et al. 2021 (rotary positions); Ainslie et al. 2023
    (grouped heads); Touvron et al. 2021 (layer scale).
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "gelu",
        layer_norm_eps: float = 1e-5,
        norm_first: bool = True,
        bias: bool = True,
        norm: str = "layernorm",
        *,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        num_kv_heads: int | None = None,
        rope_theta: float | None = None,
        cross_attention: bool = False,
        layer_scale: float | None = None,
        recompute: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = nhead if num_kv_heads is None else num_kv_heads
        sizes = {"d_model": d_model, "nhead": nhead, "dim_feedforward": dim_feedforward, "num_kv_heads": kv_heads}
        for name, size in sizes.items():
            check_count(size, name, 1)
        if d_model % nhead or nhead % kv_heads:
            raise ValueError(
                f"d_model {d_model}, nhead {nhead}, num_kv_heads {kv_heads}: expected each to be a multiple of the next"
            )
        if rope_theta is not None and (d_model // nhead) % 2:
            raise ValueError(f"rope_theta needs heads of even width, got {d_model} / {nhead} = {d_model // nhead}")
        self.d_model, self.dim_feedforward = d_model, dim_feedforward
        self.dropout = check_rate(dropout, "dropout")
        self.activation_dropout = check_rate(activation_dropout, "activation_dropout")
        self.activation = check_choice(activation, "activation", tuple(ACTIVATIONS))
        self.norm, self.eps = check_choice(norm, "norm", NORMS), layer_norm_eps
        self.norm_first, self.rope_theta = norm_first, rope_theta
        if recompute is not None:
            check_choice(recompute, "recompute", ("qkv",))
        self.recompute = recompute
        weights: dict[str, Any] = {"device": device, "dtype": dtype}
        attention_dropout = check_rate(attention_dropout, "attention_dropout")
        self.self_attn = Attention(d_model, nhead, kv_heads, attention_dropout, bias, device, dtype)
        self.multihead_attn = (
            Attention(d_model, nhead, kv_heads, attention_dropout, bias, device, dtype) if cross_attention else None
        )
        hidden = dim_feedforward * (2 if activation == "swiglu" else 1)
        self.linear1 = nn.Linear(d_model, hidden, bias=bias, **weights)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias=bias, **weights)
        for number in range(1, 1 + self.num_branches):
            rms = norm == "rmsnorm"
            self.add_module(
                f"norm{number}",
                nn.RMSNorm(d_model, layer_norm_eps, **weights)
                if rms
                else nn.LayerNorm(d_model, layer_norm_eps, bias=bias, **weights),
            )
            factors = None if layer_scale is None else nn.Parameter(torch.full((d_model,), layer_scale, **weights))
            self.register_parameter(f"layer_scale{number}", factors)

    @property
    def num_branches(self) -> int:
        """2, or 3 with cross-attention."""
        return 2 if self.multihead_attn is None else 3

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        memory_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        y: Tensor | None = None,
        visit: Visit | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """The layer alone; or, with ``visit``, in a stack.

        Args:
            attn_mask: [S, S], [B, S, S] or [B or 1, nhead or 1, S, S]; bool, True where not attended, or float, added.
            key_padding_mask: [B, S], the same.
            is_causal: position s attends to 0..s.
            memory_mask, memory_key_padding_mask: the same for ``memory``.
            position_ids: int64 [S] or [B, S], for rotary positions; None: 0..S - 1.
            y, visit: a stack's. Then the result is (x, y), y a branch that is still to be added.
        """
        if visit is not None:
            return self._pre_norm(x, y, memory, visit) if self.norm_first else (self._post_norm(x, memory, visit), None)
        self.check(x, memory)
        attend, memory_attend = self.attention(
            x,
            memory,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            is_causal=is_causal,
            memory_mask=memory_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            position_ids=position_ids,
        )
        steps = self._steps_alone(x)
        visit = Visit(None, steps, attend, memory_attend, in_place=False, cache=None)
        if not self.norm_first:
            return self._post_norm(x, memory, visit)
        x, branch = self._pre_norm(x, None, memory, visit)
        assert branch is not None
        return add(x, branch, steps[-1], in_place=False)

    def _pre_norm(
        self, x: Tensor, y: Tensor | None, memory: Tensor | None, visit: Visit
    ) -> tuple[Tensor, Tensor | None]:
        before = visit.before
        for branch, step in enumerate(visit.steps):
            if step is not None:
                norm = self._norm(branch)
                x, xhat = add_and_norm(x, y, before, step.rows, norm, in_place=visit.in_place)
                y = step.drop_out(self._branch(branch, xhat, norm, memory, step, visit))
                before = step
        return x, y

    def _post_norm(self, x: Tensor, memory: Tensor | None, visit: Visit) -> Tensor:
        # h, without the affine of a norm, is the stream of the samples ``rows``; the norm's affine is applied late, so
        # that the linear map behind it need not save its input.
        h, norm, rows = x, None, None
        for branch, step in enumerate(visit.steps):
            if step is None:
                continue
            if step.rows is not rows:
                x, norm = _put(x, rows, _affine(h, norm)), None
                rows = step.rows
                h = x if rows is None else x.index_select(0, rows)
            compact = step if rows is None or step.numbers is not None else step._replace(numbers=rows)
            y = compact.drop_out(self._branch(branch, h, norm, memory, step, visit))
            h, norm = add(_affine(h, norm), y, compact._replace(rows=None), in_place=False), self._norm(branch)
            _, h = add_and_norm(h, None, None, None, norm, in_place=False)
        return _put(x, rows, _affine(h, norm))

    def _branch(
        self, branch: int, h: Tensor, norm: nn.Module | None, memory: Tensor | None, step: Step, visit: Visit
    ) -> Tensor:
        """What a branch adds, before dropout and residual scale. h: without the affine of ``norm``."""
        factors = getattr(self, f"layer_scale{branch + 1}")
        if branch == self.num_branches - 1:
            _check_plain("linear1", self.linear1)
            _check_plain("linear2", self.linear2)
            parts = step.parts
            u = linear(h, self.linear1.weight, self.linear1.bias, norm, None if parts is None else parts.inner[0])
            dropout: dict[str, Any] = {
                "dropout_p": self.activation_dropout if step.training and step.key is not None else 0.0,
                "key": step.key,
                "site": step.inner_site,
            }
            weight, bias = _scaled(self.linear2, factors)
            return ops.act_linear(
                u, weight, bias, activation=self.activation, rows=step.mask_rows, **dropout, **_of_parts(parts)
            )
        if branch == 0:
            _check_plain("self_attn.out_proj", self.self_attn.out_proj)
            attend = visit.attend.of(step.rows, step.samples)._replace(training=step.training)
            y = self.self_attn.attend_to_itself(h, norm, attend, self.recompute == "qkv", visit.cache, step.parts)
            return _put_out(y, *_scaled(self.self_attn.out_proj, factors), step.parts)
        assert self.multihead_attn is not None
        assert memory is not None
        _check_plain("multihead_attn.out_proj", self.multihead_attn.out_proj)
        attend = visit.memory_attend.of(step.rows)._replace(training=step.training)
        y = self.multihead_attn.attend_to(h, norm, memory, step.rows, attend, step.parts)
        return _put_out(y, *_scaled(self.multihead_attn.out_proj, factors), step.parts)

    def _norm(self, branch: int) -> nn.Module:
        return self.get_submodule(f"norm{branch + 1}")

    def _steps_alone(self, x: Tensor) -> list[Step]:
        """All branches for all samples, with masks from torch's generator."""
        if not self.training or not (self.dropout or self.activation_dropout):
            return [Step(training=self.training)] * self.num_branches
        key = torch.randint(-(1 << 31), 1 << 31, (4,), dtype=torch.int32, device=x.device)
        sites = torch.arange(SITES_PER_BRANCH * self.num_branches, dtype=torch.int32, device=x.device)
        pairs = (sites + ops.FIRST_DROPOUT_SITE).view(-1, SITES_PER_BRANCH).unbind()
        alike = Step(dropout_p=self.dropout, key=key, training=True)
        return [alike._replace(site=site, inner_site=inner) for site, inner in (pair.unbind() for pair in pairs)]

    def check(self, x: Tensor, memory: Tensor | None) -> None:
        """What the layer is called with.

        Raises:
            ValueError: x is not [B, S, D], memory not [B, T, D], or there is none, or no use for it. TypeError: one
                is no tensor.
        """
        for name, value in (("x", x), ("memory", memory)):
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")
        if x.dim() != 3 or x.shape[2] != self.d_model:
            raise ValueError(f"x: got {list(x.shape)}, expected [B, S, {self.d_model}]")
        if (memory is None) != (self.multihead_attn is None):
            expected = "none without cross_attention" if memory is not None else f"[{x.shape[0]}, T, {self.d_model}]"
            got = "none" if memory is None else f"{list(memory.shape)}"
            raise ValueError(f"memory: got {got}, expected {expected}")
        if memory is not None and (memory.dim() != 3 or memory.shape[::2] != x.shape[::2]):
            raise ValueError(f"memory: got {list(memory.shape)}, expected [{x.shape[0]}, T, {self.d_model}]")

    def attention(
        self,
        x: Tensor,
        memory: Tensor | None,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        memory_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past: int = 0,
    ) -> tuple[Attend, Attend]:
        """Masks and positions as attention takes them, the same for every layer made like this one.

        Args:
            past: positions before x, whose keys and values are in a cache.
        """
        batch, length, heads = x.shape[0], x.shape[1], self.self_attn.nhead
        device = x.device.type
        like = x.new_empty(0, dtype=torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x[:0]
        shape = (batch, heads, length, past + length)
        mask, is_causal = attention_mask("", attn_mask, key_padding_mask, is_causal, shape, like)
        tables = None
        if self.rope_theta is not None:
            if position_ids is None:
                position_ids = torch.arange(past, past + length, device=x.device)
            elif position_ids.shape not in ((length,), (batch, length)):
                raise ValueError(
                    f"position_ids: got {list(position_ids.shape)}, expected [{length}] or [{batch}, {length}]"
                )
            elif position_ids.device != x.device:
                raise ValueError(f"position_ids: got a tensor on {position_ids.device}, expected one on {x.device}")
            tables = rotary_tables(position_ids, self.self_attn.head_dim, self.rope_theta, accumulator(x.dtype))
        if memory is None:
            if memory_mask is not None or memory_key_padding_mask is not None:
                raise ValueError("memory_mask, memory_key_padding_mask: got one without memory, expected none")
            return Attend(mask, is_causal, tables), Attend()
        shape = (batch, heads, length, memory.shape[1])
        memory_mask, _ = attention_mask("memory", memory_mask, memory_key_padding_mask, False, shape, like)
        return Attend(mask, is_causal, tables), Attend(memory_mask)

    @classmethod
    def from_torch(cls, layer: nn.Module) -> TransformerLayer:
        """A layer that computes what a torch.nn.TransformerEncoderLayer or TransformerDecoderLayer does.

        The parameters are shared, not copied, so that an optimizer of theirs goes on; ``copy.deepcopy`` makes others.

        Raises:
            TypeError: a module of another class. ValueError: one that takes [S, B, D] (``batch_first=False``), or whose
            activation, norms, dropouts or attention have no counterpart.
        """
        return torch_layers.from_torch(cls, layer)

    def to_torch(self) -> nn.TransformerEncoderLayer | nn.TransformerDecoderLayer:
        """The torch layer (batch_first) that computes what this one does; the parameters are shared, as there.

        Raises:
            ValueError: torch's layers have no RMSNorm, SwiGLU, grouped heads, rotary positions or layer scale.
        """
        return torch_layers.to_torch(self)

    def extra_repr(self) -> str:
        return (
            f"{self.d_model}, nhead={self.self_attn.nhead}, dim_feedforward={self.dim_feedforward}, "
            f"dropout={self.dropout}, activation={self.activation!r}, norm_first={self.norm_first}"
        )


def _affine(h: Tensor, norm: nn.Module | None) -> Tensor:
    """The stream, from what a norm made of it without its affine; saves nothing but that."""
    if norm is None:
        return h
    weight, bias = cast(Tensor, norm.weight), getattr(norm, "bias", None)
    scaled = h * weight if bias is None else torch.addcmul(bias, h, weight)
    return scaled.to(h.dtype)


def _check_plain(name: str, end: nn.Module) -> None:
    """Another linear map in its place, such as a LoRA adapter's, would be ignored."""
    if type(end).forward is not nn.Linear.forward:
        raise TypeError(
            f"{name}: got a {type(end).__name__}, expected an nn.Linear, of which the layer reads the weights and does "
            "not call the forward: change the weights, as torch.nn.utils.parametrize does"
        )


def _put(x: Tensor, rows: Tensor | None, values: Tensor) -> Tensor:
    return values if rows is None else PutBack.apply(x, values, rows)  # type: ignore[no-untyped-call]


def _scaled(end: nn.Linear, factors: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The linear map that ends a branch, with the layer scale in its weights, so that no token has to be saved."""
    if factors is None:
        return end.weight, end.bias
    return end.weight * factors[:, None], None if end.bias is None else end.bias * factors


def _put_out(y: Tensor, weight: Tensor, bias: Tensor | None, parts: PartBlocks | None) -> Tensor:
    """The output projection, of the heads that run."""
    if parts is None:
        return nn.functional.linear(y, weight, bias)
    return ops.act_linear(y, weight, bias, activation="identity", **_of_parts(parts))


def _of_parts(parts: PartBlocks | None) -> dict[str, Any]:
    """The keywords of ``act_linear``."""
    return {} if parts is None else {"blocks": parts.outer, "scale": parts.scale}
