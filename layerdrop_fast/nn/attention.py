"""Multi-head attention over ``scaled_dot_product_attention``: masks, rotary positions, packed rows, a cache."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerdrop_fast._checks import check_count
from layerdrop_fast.nn.parts import PartBlocks
from layerdrop_fast.nn.recompute import recomputed_by_the_compiler, recomputed_in_backward
from layerdrop_fast.ops import Blocks, norm_linear


class Attend(NamedTuple):
    """What the queries of a forward may attend to, and where they stand; one for all layers."""

    mask: Tensor | None = None  # [B or 1, H or 1, S or 1, T]; bool, True where attended, or a float that is added
    is_causal: bool = False  # instead of a mask
    rotary: tuple[Tensor, Tensor] | None = None  # cos, sin [B or 1, S, 1, head_dim / 2] f32 (f64 for f64)
    lengths: Sequence[int] | None = None  # of packed sequences
    training: bool = False  # whether attention weights have dropout

    def of(self, rows: Tensor | None, samples: Sequence[int] | None = None) -> Attend:
        """For the samples in ``rows`` (packed: ``samples``, on the host) alone."""
        if rows is None:
            return self
        if self.lengths is not None:
            assert samples is not None
            tables = self.rotary
            rotary = None if tables is None else (tables[0].index_select(1, rows), tables[1].index_select(1, rows))
            return self._replace(lengths=[self.lengths[sample] for sample in samples], rotary=rotary)
        rotary = self.rotary
        if rotary is not None and rotary[0].shape[0] > 1:
            rotary = self.read(rotary[0], rows), self.read(rotary[1], rows)
        mask = self.mask
        if mask is not None and mask.shape[0] > 1:
            mask = self.read(mask, rows)
        return self._replace(mask=mask, rotary=rotary)

    def of_heads(self, parts: PartBlocks | None, heads: int) -> Attend:
        """For some of a layer's heads alone."""
        if self.mask is not None and self.mask.shape[1] not in (1, heads):
            raise ValueError(f"a mask of {self.mask.shape[1]} heads for a layer of {heads}: expected one for all heads")
        if parts is None or self.mask is None or self.mask.shape[1] == 1:
            return self
        return self._replace(mask=self.mask.index_select(1, parts.outer.kept))

    def read(self, x: Tensor, rows: Tensor) -> Tensor:
        """Those samples of a tensor that all layers share."""
        return x.index_select(0, rows)


class KVCache:
    """Keys and values of what a decoder has read, so that a new token costs one position and not all of them.

        cache = KVCache(max_len=512)
        stack(prompt, is_causal=True, cache=cache)     # [B, S, D]
        stack(next_token, is_causal=True, cache=cache)  # [B, 1, D]

    Evaluation only. Holds, for each layer, two tensors [B, num_kv_heads, max_len, head_dim].

    Args:
        max_len: the most positions, at least 1.

    Raises:
        ValueError, TypeError: max_len is not that; when read into, more positions or another number of samples.
    """

    def __init__(self, max_len: int) -> None:
        self.max_len = check_count(max_len, "max_len", 1)
        self.length = 0  # positions that all layers have read
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self._reader: tuple[weakref.ref[nn.Module], int] | None = None  # whose it is, and how many samples

    def enter(self, stack: nn.Module, samples: int, positions: int) -> int:
        """Before a forward of this stack, with so many samples and positions; returns the positions read so far.

        Raises:
            ValueError: the cache has read another number of samples, or for another stack, or has no room.
        """
        if not self.length:
            self._held.clear()
        elif self._reader is not None:
            reader, held = self._reader
            if reader() is not stack:
                raise ValueError("cache: got one that another stack has read into, expected a KVCache for each stack")
            if held != samples:
                raise ValueError(f"cache: got x of {samples} samples, expected {held}, as the cache has read")
        self._reader = weakref.ref(stack), samples
        if self.length + positions > self.max_len:
            raise ValueError(
                f"cache: got {self.length} positions read and {positions} new ones, expected at most {self.max_len}"
            )
        return self.length

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends k, v [B, num_kv_heads, S, head_dim] of a layer; returns all that it has read."""
        end = self.length + k.shape[2]
        if layer not in self._held:
            shape = (*k.shape[:2], self.max_len, k.shape[3])
            self._held[layer] = k.new_empty(shape), v.new_empty(shape)
        held = self._held[layer]
        for whole, new in zip(held, (k, v), strict=True):
            whole[:, :, self.length : end] = new
        return held[0][:, :, :end], held[1][:, :, :end]


def positions_read(cache: Any, stack: nn.Module, x: Tensor) -> int:
    """The positions that a stack's cache has read, before x [B, S, D] goes in.

    Raises:
        TypeError: no KVCache. ValueError: the stack is training, or the cache does not fit.
    """
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache: got {type(cache).__name__}, expected a KVCache")
    if stack.training:
        raise ValueError("cache: got one while training, expected stack.eval()")
    return cache.enter(stack, x.shape[0], x.shape[1])


class Attention(nn.Module):
    """The weights of multi-head attention, under the names of ``nn.MultiheadAttention``, and what it computes.

    Query heads share key and value heads in groups where ``num_kv_heads < nhead`` (Ainslie et al. 2023).

    State dict: in_proj_weight [(nhead + 2 num_kv_heads) * head_dim, D] (query, key, value), in_proj_bias, out_proj.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        num_kv_heads: int,
        dropout: float,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.nhead, self.num_kv_heads, self.head_dim, self.dropout = nhead, num_kv_heads, d_model // nhead, dropout
        rows = (nhead + 2 * num_kv_heads) * self.head_dim
        self.in_proj_weight = nn.Parameter(torch.empty(rows, d_model, device=device, dtype=dtype))
        self.in_proj_bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None
        self.out_proj = nn.Linear(d_model, d_model, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.MultiheadAttention``: Xavier-uniform input projection, zero biases."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def attend_to_itself(
        self,
        h: Tensor,
        norm: nn.Module | None,
        attend: Attend,
        recompute: bool,
        cache: tuple[KVCache, int] | None,
        parts: PartBlocks | None = None,
    ) -> Tensor:
        """Self-attention, before the output projection.

        Shapes:
            h: [K, S, D], packed [N, D]; the input, without the affine of ``norm``. -> the same shape, of ``parts`` the
            kept heads' channels
        """
        groups, blocks = self._groups(parts), None if parts is None else parts.inner[0]
        attend = attend.of_heads(parts, self.nhead)

        def project(h: Tensor, *weights: Tensor | None) -> Tensor:
            heads = _linear(h, *weights, blocks=blocks).unflatten(-1, (-1, self.head_dim))  # type: ignore[arg-type, misc]
            return heads if attend.rotary is None else rotate(heads, attend.rotary, groups[0] + groups[1])

        weights = (self.in_proj_weight, self.in_proj_bias, *affine_of(norm))
        if recompute and torch.compiler.is_compiling():
            return recomputed_by_the_compiler(lambda h: self._mix(project(h, *weights), attend, cache, groups), h)
        with recomputed_in_backward(project, h, *weights, enabled=recompute) as heads:
            return self._mix(heads, attend, cache, groups)

    def _groups(self, parts: PartBlocks | None) -> tuple[int, int, int]:
        """How many heads of query, key and value run."""
        kv = self.num_kv_heads if parts is None else parts.number
        return kv * (self.nhead // self.num_kv_heads), kv, kv

    def _mix(
        self, heads: Tensor, attend: Attend, cache: tuple[KVCache, int] | None, groups: tuple[int, int, int]
    ) -> Tensor:
        if attend.lengths is not None:
            return self._packed(heads, groups, attend)
        # Split first: in backward the gradients are then put behind one another where the product reads them.
        q, k, v = (part.transpose(1, 2) for part in heads.split(groups, dim=2))
        if cache is not None:
            k, v = cache[0].extend(cache[1], k, v)
        return self._attend(q, k, v, attend).transpose(1, 2).flatten(2)

    def attend_to(
        self,
        h: Tensor,
        norm: nn.Module | None,
        memory: Tensor,
        rows: Tensor | None,
        attend: Attend,
        parts: PartBlocks | None = None,
    ) -> Tensor:
        """Cross-attention to ``memory`` [B, T, D], of which the samples ``rows`` are read; as ``attend_to_itself``."""
        query, key_value = (None, None) if parts is None else parts.inner
        attend = attend.of_heads(parts, self.nhead)
        width = self.nhead * self.head_dim
        weights = self.in_proj_weight.split((width, self.in_proj_weight.shape[0] - width))
        biases = (None, None) if self.in_proj_bias is None else self.in_proj_bias.split([len(w) for w in weights])
        q = linear(h, weights[0], biases[0], norm, query).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        def take(memory: Tensor) -> Tensor:
            return memory if rows is None else attend.read(memory, rows)

        # memory itself is held once for all layers.
        with recomputed_in_backward(take, memory, enabled=rows is not None) as taken:
            kv = _linear(taken, weights[1], biases[1], None, None, key_value).unflatten(-1, (-1, self.head_dim))
        k, v = kv.transpose(1, 2).chunk(2, dim=1)
        return self._attend(q, k, v, attend).transpose(1, 2).flatten(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        mask = attend.mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if attend.training else 0.0,
            is_causal=attend.is_causal,
            enable_gqa=self.num_kv_heads != self.nhead,
        )

    def _packed(self, heads: Tensor, groups: tuple[int, int, int], attend: Attend) -> Tensor:
        assert attend.lengths is not None
        alone = Attend(is_causal=attend.is_causal, training=attend.training)
        found = [heads.new_empty(0, groups[0] * self.head_dim)]
        for part in heads.split([length for length in attend.lengths if length]):
            q, k, v = (heads.transpose(0, 1)[None] for heads in part.split(groups, dim=1))
            found.append(self._attend(q, k, v, alone)[0].transpose(0, 1).flatten(1))
        return torch.cat(found)


def linear(
    h: Tensor, weight: Tensor, bias: Tensor | None, norm: nn.Module | None, blocks: Blocks | None = None
) -> Tensor:
    """A linear map of h, or some blocks of its rows, behind the affine of a norm if there is one."""
    return _linear(h, weight, bias, *affine_of(norm), blocks)


def _linear(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    blocks: Blocks | None = None,
) -> Tensor:
    if gamma is None and blocks is None:
        return F.linear(h, weight, bias)
    return norm_linear(h, weight, bias, gamma=gamma, beta=beta, blocks=blocks)


def affine_of(norm: nn.Module | None) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift of a norm."""
    return getattr(norm, "weight", None), getattr(norm, "bias", None)


def rotary_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of ``position * theta^(-2i / head_dim)`` (Su et al. 2021).

    Shapes:
        positions: int64 [S] or [B, S] -> [1 or B, S, 1, head_dim / 2] of ``dtype``
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    angles = positions[..., None] * theta**-exponents
    angles = angles.unsqueeze(-2) if positions.dim() == 2 else angles[None, :, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(heads: Tensor, tables: tuple[Tensor, Tensor], turned: int) -> Tensor:
    """The first ``turned`` heads rotated by their positions, the others as they are.

    Shapes:
        heads: [K, S, H, head_dim], packed [N, H, head_dim] -> the same shape
    """
    cos, sin = tables if heads.dim() == 4 else (tables[0][0], tables[1][0])
    first, second = heads[..., :turned, :].chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((rotated.to(heads.dtype), heads[..., turned:, :]), dim=-2)


def _check_mask(name: str, mask: Tensor, device: torch.device) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: got {type(mask).__name__}, expected a tensor")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name}: got {mask.dtype}, expected bool (True: not attended) or float")
    if mask.device != device:
        raise ValueError(f"{name}: got a tensor on {mask.device}, expected one on {device}")


def attention_mask(
    of: str,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    shape: tuple[int, int, int, int],
    like: Tensor,
) -> tuple[Tensor | None, bool]:
    """torch's masks, in ``nn.MultiheadAttention``'s sense, as one for ``scaled_dot_product_attention``.

    Args:
        of: "memory" or "", for the names in errors.
        attn_mask: [S, T], [B, S, T], [B * H, S, T] or [B or 1, H or 1, S, T]; bool, True where NOT attended, or a float
            that is added.
        key_padding_mask: [B, T], the same.
        is_causal: query s attends to the keys up to T - S + s.
        shape: (B, H, S, T).
        like: has the dtype and the device of the queries.

    Returns:
        (mask [B or 1, H or 1, S or 1, T], is_causal): one of them at most.
    """
    b, h, s, t = shape
    name, padding = (f"{of}_mask", f"{of}_key_padding_mask") if of else ("attn_mask", "key_padding_mask")
    for which, given in ((name, attn_mask), (padding, key_padding_mask)):
        if given is not None:
            _check_mask(which, given, like.device)
    masks = []
    if attn_mask is not None:
        if attn_mask.dim() == 3 and attn_mask.shape[0] == b * h and h > 1:
            attn_mask = attn_mask.unflatten(0, (b, h))
        lead = {2: (None, None), 3: (slice(None), None)}.get(attn_mask.dim(), ())
        full = attn_mask[lead] if lead else attn_mask
        if full.dim() != 4 or full.shape[0] not in (1, b) or full.shape[1] not in (1, h) or full.shape[2:] != (s, t):
            raise ValueError(
                f"{name}: got {list(attn_mask.shape)}, expected [{s}, {t}], [{b}, {s}, {t}] or [{b}, {h}, {s}, {t}]"
            )
        masks.append(full)
    if key_padding_mask is not None:
        if key_padding_mask.shape != (b, t):
            raise ValueError(f"{padding}: got {list(key_padding_mask.shape)}, expected [{b}, {t}]")
        masks.append(key_padding_mask[:, None, None])
    if is_causal and (masks or 1 < s < t):
        masks.append(torch.ones(s, t, dtype=torch.bool, device=like.device).triu(1 + t - s)[None, None])
        is_causal = False
    if not masks:
        return None, is_causal and s > 1
    blocked = [mask for mask in masks if mask.dtype == torch.bool]
    added = [mask.to(like.dtype) for mask in masks if mask.dtype != torch.bool]
    hidden = None
    for mask in blocked:
        hidden = mask if hidden is None else hidden | mask
    if not added:
        assert hidden is not None
        return ~hidden, False
    total = sum(added[1:], added[0])
    return total if hidden is None else total.masked_fill(hidden, float("-inf")), False
