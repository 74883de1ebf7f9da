"""The MaskGIT transformer in the layout of the released checkpoints (Halton-MaskGIT v1, `Network/transformer.py`).

One table embeds codes, [M] and classes, and is the output matrix too; the class token comes last in the sequence; each
position has its own output bias. Layers are stacked along a leading axis and run with `lax.scan`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dimo_jax.errors import UserError
from dimo_jax.models.layers import Linear, Mlp, SelfAttention, dropout, embed, gelu, perturb
from dimo_jax.nets import Net, TokenSpec

# Logical axes of the parameters, first match wins: sharding.py maps the names to mesh axes.
LOGICAL_AXES = (
    (r"^blocks/.*(qkv|fc1)/kernel$", ("layers", "embed", "hidden")),
    (r"^blocks/.*(out|fc2)/kernel$", ("layers", "hidden", "embed")),
    (r"^blocks/", ("layers", None)),
    (r"^tok_emb$", ("vocab", "embed")),
    (r"^bias$", (None, "vocab")),
    (r"^pos_emb$", (None, "embed")),
    (r"^(first|last)/fc.?/kernel$", ("embed", "hidden")),
    (r"^(first|last)/", (None,)),
)


@dataclasses.dataclass(frozen=True)
class MaskGITSpec:
    """Architecture; defaults are the released ImageNet-256 teacher's.

    num_logits: codebook_size, or one more for logits with a column for [M] (DEVIATION 8: the released code samples it).
    unroll: layers in one turn of the scan; XLA's CPU backend runs a loop's body on one thread: unroll all there.
    """

    codebook_size: int = 1024
    grid: tuple[int, int] = (16, 16)
    num_classes: int = 1000
    width: int = 768
    depth: int = 24
    heads: int = 16
    mlp_dim: int = 3072
    dropout: float = 0.1
    num_logits: int = 1025
    dtype: str = "float32"
    remat: bool = False
    unroll: int = 1

    def __post_init__(self):
        if self.num_logits - self.codebook_size not in (0, 1):
            raise UserError(f"num_logits is codebook_size {self.codebook_size}, or one more; given {self.num_logits}")
        if self.width % self.heads:
            raise UserError(f"width {self.width} does not divide over {self.heads} heads")

    @property
    def tokens(self) -> TokenSpec:
        """Codes, then [M]; class c is the id codebook_size + 1 + c, the dropped class comes after the last."""
        k = self.codebook_size
        return TokenSpec(
            length=self.grid[0] * self.grid[1],
            codebook_size=k,
            mask_token=k,
            num_logits=self.num_logits,
            grid=tuple(self.grid),
            class_tokens=(k + 1, self.num_classes),
        )


class Block(nnx.Module):
    """Pre-norm attention and MLP, each with a residual; LayerNorm epsilon 1e-5."""

    def __init__(self, spec: MaskGITSpec, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(spec.width, epsilon=1e-5, dtype=spec.dtype, rngs=rngs)
        self.attention = SelfAttention(spec.width, spec.heads, spec.dropout, spec.dtype, rngs)
        self.norm2 = nnx.LayerNorm(spec.width, epsilon=1e-5, dtype=spec.dtype, rngs=rngs)
        self.mlp = Mlp(spec.width, spec.mlp_dim, spec.dropout, spec.dtype, rngs)

    def __call__(self, x, rng, mask):
        """x [B, N, D] -> [B, N, D]."""
        k1, k2 = (None, None) if rng is None else jax.random.split(rng)
        x = x + self.attention(self.norm1(x), k1, mask)
        return x + self.mlp(self.norm2(x), k2)


class FirstLayer(nnx.Module):
    """Norm, dropout, linear, GELU, norm, dropout, linear; LayerNorm epsilon 1e-12."""

    def __init__(self, spec: MaskGITSpec, rngs: nnx.Rngs):
        width = spec.width
        self.rate = spec.dropout
        self.norm1 = nnx.LayerNorm(width, epsilon=1e-12, dtype=spec.dtype, rngs=rngs)
        self.fc1 = Linear(width, width, dtype=spec.dtype, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-12, dtype=spec.dtype, rngs=rngs)
        self.fc2 = Linear(width, width, dtype=spec.dtype, rngs=rngs)

    def __call__(self, x, rng):
        """x [B, N, D] -> [B, N, D]."""
        k1, k2 = (None, None) if rng is None else jax.random.split(rng)
        x = gelu(self.fc1(dropout(self.norm1(x), self.rate, k1)))
        return self.fc2(dropout(self.norm2(x), self.rate, k2))


class LastLayer(nnx.Module):
    """Norm, linear, GELU, norm; LayerNorm epsilon 1e-12."""

    def __init__(self, spec: MaskGITSpec, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(spec.width, epsilon=1e-12, dtype=spec.dtype, rngs=rngs)
        self.fc = Linear(spec.width, spec.width, dtype=spec.dtype, rngs=rngs)
        self.norm2 = nnx.LayerNorm(spec.width, epsilon=1e-12, dtype=spec.dtype, rngs=rngs)

    def __call__(self, x):
        """x [B, N, D] -> [B, N, D]."""
        return self.norm2(gelu(self.fc(self.norm1(x))))


class MaskGIT(nnx.Module):
    """Ids [B, L] and labels [B] -> hidden states [B, L, D] -> logits."""

    def __init__(self, spec: MaskGITSpec, rngs: nnx.Rngs):
        self.spec = spec
        tokens = spec.tokens
        rows = tokens.mask_token + 1 + spec.num_classes + 1
        normal = nnx.initializers.normal(0.02)
        self.tok_emb = nnx.Param(normal(rngs.params(), (rows, spec.width)))
        self.pos_emb = nnx.Param(normal(rngs.params(), (tokens.length + 1, spec.width)))
        self.bias = nnx.Param(jnp.zeros((tokens.length + 1, rows)))
        self.first = FirstLayer(spec, rngs)
        self.blocks = nnx.vmap(lambda keys: Block(spec, nnx.Rngs(keys)))(jax.random.split(rngs.params(), spec.depth))
        self.last = LastLayer(spec, rngs)

    def __call__(self, x, labels, *, sigma=0.0, noise=None, dropout_rng=None, attn_mask=None, collect=False):
        """-> (h [B, L, D], {"blocks": with `collect`, every block's output [depth, B, L + 1, D]}); see Net.trunk."""
        table = self.tok_emb[...].astype(self.spec.dtype)
        first_class = self.spec.tokens.class_tokens[0]
        visual = perturb(embed(table, x), sigma, noise)  # visual tokens only, before the position embedding
        h = jnp.concatenate([visual, table[first_class + labels][:, None]], axis=1)
        h = h + self.pos_emb[...].astype(h.dtype)
        key_first, key_blocks = (None, None) if dropout_rng is None else jax.random.split(dropout_rng)
        h = self.first(h, key_first)
        graph, blocks = nnx.split(self.blocks)
        keys = None if key_blocks is None else jax.random.split(key_blocks, self.spec.depth)
        mask = None if attn_mask is None else _with_class_token(attn_mask)

        def body(h, layer):
            block, key = layer
            h = nnx.merge(graph, block)(h, key, mask)
            return h, h if collect else None

        body = jax.checkpoint(body) if self.spec.remat else body
        h, outputs = jax.lax.scan(body, h, (blocks, keys), unroll=self.spec.unroll)
        return self.last(h)[:, : x.shape[1]], {"blocks": outputs}

    def head(self, h, start, length):
        """Logits [B, length, V] of the positions start .. start + length."""
        columns = self.spec.tokens.num_logits
        h = jax.lax.dynamic_slice_in_dim(h, start, length, axis=1)
        bias = jax.lax.dynamic_slice_in_dim(self.bias[:, :columns], start, length, axis=0)
        return h @ self.tok_emb[:columns].T.astype(h.dtype) + bias.astype(h.dtype)


def _with_class_token(mask):
    """The class token, last, is seen by all and sees all: [..., L, L] -> [..., L + 1, L + 1]."""
    return jnp.pad(mask, [(0, 0)] * (mask.ndim - 2) + [(0, 1), (0, 1)], constant_values=True)


def init(spec: MaskGITSpec, rng: jax.Array) -> dict:
    """Random parameters as a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(MaskGIT(spec, nnx.Rngs(params=rng)), nnx.Param))


def as_net(spec: MaskGITSpec) -> Net:
    """The network as pure functions of a nested dict of parameters."""
    graph, abstract = nnx.split(nnx.eval_shape(lambda: MaskGIT(spec, nnx.Rngs(0))), nnx.Param)

    def bind(params):
        state = jax.tree.map(lambda x: x, abstract)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    return Net(
        trunk=lambda params, x, cond, r, **kwargs: bind(params)(x, cond, **kwargs)[0],
        head=lambda params, h, start, length: bind(params).head(h, start, length),
        features=lambda params, x, cond, r, **kwargs: bind(params)(x, cond, collect=True, **kwargs),
        noise_shape=lambda batch: (batch, spec.tokens.length, spec.width),
    )
