"""The reference's ops on a tape: each keeps what its gradient needs, and `run_back` runs them in
reverse (reverse-mode differentiation).

A graph of `models/` gets a `Tape` as its ops. Activations are `Node`s, weights plain arrays, which
have no gradients. Values are the reference's own, but for attention, which is computed for one
request from position 0, without a cache.

Shapes: T tokens, H query heads, KH key/value heads, D head_dim.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..backends.reference import ops as reference
from ..batch import AttentionMetadata, IntArray
from ..ops.protocol import KVLayer, RopeTable

__all__ = ["Floats", "Node", "Observe", "Tape"]

Floats: TypeAlias = NDArray[Any]  # float32; sums with Python numbers lose the dtype for NumPy
# (name of a weight, its input [T, in], the gradients of its output [T, out])
Observe: TypeAlias = Callable[[str, Floats, Floats], None]
Back: TypeAlias = Callable[[Floats], None]


class Node:
    """An activation, and the gradient of the loss with respect to it, when it is known."""

    def __init__(self, value: Floats) -> None:
        self.value = value
        self.grad: Floats | None = None

    def add(self, grad: Floats) -> None:
        self.grad = grad if self.grad is None else self.grad + grad


class _Store:
    """The keys and values of one request."""

    k: Node
    v: Node


class Tape:
    """An `Ops` (`ops/protocol.py`) that remembers."""

    def __init__(self, weights: Mapping[str, Floats], observe: Observe | None = None) -> None:
        """`observe` is called for each linear layer on the way back. Without it nothing is kept."""
        self._names = {id(weight): name for name, weight in weights.items()}
        self._observe = observe
        self._steps: list[tuple[Node, Back]] = []

    def input(self, value: Floats) -> Node:
        return Node(value)

    def new_store(self) -> _Store:
        return _Store()

    def run_back(self, out: Node, grad: Floats) -> None:
        """Compute the gradients of all nodes from that of the last. What the steps kept is freed on
        the way, and the tape is empty then: its steps refer to it, so they would stay in memory.
        """
        out.grad = grad
        while self._steps:
            node, back = self._steps.pop()
            if node.grad is not None:
                back(node.grad)
            node.grad = None

    def _made(self, value: Floats, back: Back) -> Node:
        node = Node(value)
        if self._observe is not None:
            self._steps.append((node, back))
        return node

    def embedding(self, table: Floats, input_ids: IntArray, scale: float = 1.0) -> Node:
        return Node(reference.embedding(table, input_ids, scale))

    def linear(self, x: Node, weight: Floats, bias: Floats | None = None) -> Node:
        def back(g: Floats) -> None:
            if self._observe is not None:
                self._observe(self._names[id(weight)], x.value, g)
            x.add(g @ weight)

        return self._made(reference.linear(x.value, weight, bias), back)

    def rms_norm(self, x: Node, weight: Floats, eps: float) -> Node:
        def back(g: Floats) -> None:
            inverse = _inverse_root(x.value * x.value, eps)
            unit, g = x.value * inverse, g * weight
            x.add((g - unit * np.mean(g * unit, axis=-1, keepdims=True)) * inverse)

        return self._made(reference.rms_norm(x.value, weight, eps), back)

    def layer_norm(self, x: Node, weight: Floats, bias: Floats, eps: float) -> Node:
        def back(g: Floats) -> None:
            centered = x.value - np.mean(x.value, axis=-1, keepdims=True)
            inverse = _inverse_root(centered * centered, eps)
            unit, g = centered * inverse, g * weight
            g = g - np.mean(g, axis=-1, keepdims=True)
            x.add((g - unit * np.mean(g * unit, axis=-1, keepdims=True)) * inverse)

        return self._made(reference.layer_norm(x.value, weight, bias, eps), back)

    def add(self, x: Node, y: Node) -> Node:
        def back(g: Floats) -> None:
            x.add(g)
            y.add(g)

        return self._made(reference.add(x.value, y.value), back)

    def silu_mul(self, gate: Node, up: Node) -> Node:
        def back(g: Floats) -> None:
            with np.errstate(over="ignore"):  # the sigmoid is then 0
                sigmoid = 1 / (1 + np.exp(-gate.value))
            up.add(g * gate.value * sigmoid)
            gate.add(g * up.value * sigmoid * (1 + gate.value * (1 - sigmoid)))

        return self._made(reference.silu_mul(gate.value, up.value), back)

    def gelu_mul(self, gate: Node, up: Node) -> Node:
        def back(g: Floats) -> None:
            up.add(g * reference.gelu(gate.value))
            gate.add(g * up.value * _gelu_slope(gate.value))

        return self._made(reference.gelu_mul(gate.value, up.value), back)

    def gelu(self, x: Node) -> Node:
        return self._made(reference.gelu(x.value), lambda g: x.add(g * _gelu_slope(x.value)))

    def softcap(self, x: Node, cap: float) -> Node:
        value = reference.softcap(x.value, cap)
        return self._made(value, lambda g: x.add(g * (1 - np.square(value / cap))))

    def split_heads(self, x: Node, num_heads: int) -> Node:
        value = reference.split_heads(x.value, num_heads)
        return self._made(value, lambda g: x.add(g.reshape(x.value.shape)))

    def rope(self, x: Node, positions: IntArray, table: RopeTable) -> Node:
        # a rotation: back it turns the other way
        back_table = RopeTable(tuple(-f for f in table.inv_freq), table.scale)
        value = reference.rope(x.value, positions, table)
        return self._made(value, lambda g: x.add(reference.rope(g, positions, back_table)))

    def kv_write(self, kv: KVLayer, k: Node, v: Node, slot_mapping: IntArray) -> None:
        kv.store.k, kv.store.v = k, v

    def attention(
        self,
        q: Node,
        kv: KVLayer,
        metadata: AttentionMetadata,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Node:
        k, v = kv.store.k, kv.store.v
        tokens, heads, _ = q.value.shape
        groups, queries = k.value.shape[1], heads // k.value.shape[1]

        def by_group(x: Floats) -> Floats:  # [T, H, D] -> [KH, G·T, D]
            parts = x.reshape(tokens, groups, -1, x.shape[-1])
            return parts.transpose(1, 2, 0, 3).reshape(groups, -1, x.shape[-1])

        def by_token(x: Floats) -> Floats:  # and back
            parts = x.reshape(groups, -1, tokens, x.shape[-1])
            return parts.transpose(2, 0, 1, 3).reshape(tokens, -1, x.shape[-1])

        qs, ks, vs = by_group(q.value), by_group(k.value), by_group(v.value)
        # scores [KH, G·T, T], as in reference/attention.py
        scores = qs @ ks.transpose(0, 2, 1) * np.float32(scale)
        capped = scores if softcap is None else reference.softcap(scores, softcap)
        place = np.arange(tokens)
        hidden = place[None] > place[:, None]
        if window is not None:
            hidden |= place[None] <= place[:, None] - window
        p = np.where(np.tile(hidden, (queries, 1)), np.float32(-np.inf), capped)
        p -= p.max(axis=-1, keepdims=True)
        np.exp(p, out=p)
        p /= p.sum(axis=-1, keepdims=True)

        def back(g: Floats) -> None:
            gs = by_group(g.reshape(tokens, heads, -1))
            v.add(by_token(p.transpose(0, 2, 1) @ gs))
            of_p = gs @ vs.transpose(0, 2, 1)
            of_s = p * (of_p - np.sum(of_p * p, axis=-1, keepdims=True))
            if softcap is not None:
                of_s *= 1 - np.square(capped / np.float32(softcap))
            of_s *= np.float32(scale)
            q.add(by_token(of_s @ ks))
            k.add(by_token(of_s.transpose(0, 2, 1) @ qs))

        return self._made(by_token(p @ vs).reshape(tokens, -1), back)

    def take_rows(self, x: Node, indices: IntArray) -> Node:
        def back(g: Floats) -> None:
            whole = np.zeros_like(x.value)
            whole[indices] = g
            x.add(whole)

        return self._made(reference.take_rows(x.value, indices), back)

    def all_reduce(self, x: Node) -> Node:
        return x


def _inverse_root(squares: Floats, eps: float) -> Any:
    """1 / sqrt(mean + eps) over the last axis."""
    return 1 / np.sqrt(np.mean(squares, axis=-1, keepdims=True) + np.float32(eps))


def _gelu_slope(x: Floats) -> Floats:
    """The derivative of gelu."""
    near = np.clip(x, -reference.GELU_SATURATES, reference.GELU_SATURATES)
    inner = reference.SQRT_2_OVER_PI * (near + 0.044715 * near * near * near)
    t = np.tanh(inner)
    slope = reference.SQRT_2_OVER_PI * (1 + 3 * 0.044715 * near * near)
    found: Floats = 0.5 * (1 + t) + 0.5 * near * (1 - t * t) * slope
    return found
