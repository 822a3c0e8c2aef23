"""A Llama-type decoder in Flax NNX: RMSNorm, rotary positions, SwiGLU, grouped-query attention, a scan over layers.

Query, key and value are one `nnx.Linear` and so are gate and up: an input that two products share is rotated and
quantized once. Sources: Touvron et al. 2023, arXiv:2302.13971; Ainslie et al. 2023, arXiv:2305.13245 (groups)."""

import dataclasses
import difflib
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

import lowbit_jax as lb
from lowbit_jax.ops import backend
from recipes import kv_cache
from recipes.kv_cache import KVCache

PRODUCT = "product"  # name of what the layers' products answer, for rematerialization
ATTENTION = ("auto", "cudnn", "xla")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    context: int
    batch: int  # sequences a step
    learning_rate: float  # peak
    steps: int
    warmup: float = 0.1  # share of the steps
    init: str = "fan_in"  # "fan_in": std 1/sqrt(fan in); "0.02": std 0.02, as the QuEST runs
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    rope_scaling: tuple[float, float, float, float] | None = None  # Llama 3's: see `rotary_table`

    def __post_init__(self):
        if self.rope_scaling is not None:  # JSON has lists
            object.__setattr__(self, "rope_scaling", tuple(self.rope_scaling))

    def settings(self) -> dict[str, object]:
        """All that the numbers of a run depend on; without what runs from before it had not."""
        told = dataclasses.asdict(self)
        return {name: value for name, value in told.items() if name != "rope_scaling" or value is not None}

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def block_params(self) -> int:
        """Parameters without embedding and head."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.ffn + 2 * self.width) + self.width

    def params(self, vocab_size: int) -> int:
        """All of them."""
        return self.block_params + 2 * vocab_size * self.width


def _quest(layers: int, width: int, heads: int, ffn: int, learning_rate: float, steps: int) -> LlamaConfig:
    """A row of the QuEST set-up: 512 sequences of 512 tokens a step (Panferov et al. 2025, arXiv:2502.05003)."""
    return LlamaConfig(layers=layers, width=width, heads=heads, kv_heads=heads, ffn=ffn, context=512, batch=512,
                       learning_rate=learning_rate, steps=steps, init="0.02")  # fmt: skip


PRESETS = {
    "smoke": LlamaConfig(layers=2, width=64, heads=2, kv_heads=1, ffn=128, context=32, batch=4,
                         learning_rate=3e-3, steps=20),
    "tiny": LlamaConfig(layers=3, width=128, heads=4, kv_heads=2, ffn=384, context=128, batch=16,
                        learning_rate=3e-3, steps=400),
    "30M": _quest(6, 640, 5, 1792, 1.2e-3, 11444),
    "50M": _quest(7, 768, 6, 2048, 1.2e-3, 19073),
    "100M": _quest(8, 1024, 8, 2816, 6e-4, 38146),
    "200M": _quest(10, 1280, 10, 3584, 3e-4, 76293),
    "430M": _quest(13, 1664, 13, 4608, 1.5e-4, 164031),
    "800M": _quest(16, 2048, 16, 5632, 7.5e-5, 305175),
    "1.6B": _quest(20, 2560, 20, 6912, 3.75e-5, 610351),
    # Not in their table: the next of the family (layers = heads = width / 128, twice the parameters).
    "3.2B": _quest(25, 3200, 25, 8704, 1.875e-5, 1220703),
}  # fmt: skip


def preset(name: str, **changes) -> LlamaConfig:
    """The preset of that name with the `changes` that are not None."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.3)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"recipes.llama has no preset {name!r}; it has {', '.join(PRESETS)}.{hint}")
    return dataclasses.replace(PRESETS[name], **{key: value for key, value in changes.items() if value is not None})


def build(config: LlamaConfig, vocab_size: int, *, dtype: str = "auto", remat: str = "none", seed: int = 0,
          attention: str = "auto", unroll: bool | None = None) -> "Llama":  # fmt: skip
    """A model with weights drawn from `seed`; float32 masters, activations in `dtype`."""
    chosen = jnp.dtype(activation_dtype(dtype))
    return _build(config, vocab_size, chosen, remat, attention, unroll, jax.random.key(seed))


def activation_dtype(dtype: str) -> str:
    """What "auto" stands for on this machine."""
    auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return auto if dtype == "auto" else dtype


@functools.partial(nnx.jit, static_argnums=range(6))  # one compiled program instead of hundreds of small ones
def _build(config: LlamaConfig, vocab_size: int, dtype, remat: str, attention: str, unroll, key: Array) -> "Llama":
    return Llama(config, vocab_size, dtype=dtype, remat=remat, attention=attention, unroll=unroll, rngs=nnx.Rngs(key))


class Llama(nnx.Module):
    """Token ids in, float32 logits of the next token out.

    attention: "cudnn" is the flash attention of NVIDIA's library, "xla" writes the scores to memory, "auto" takes cuDNN
    where it serves: see `attend`. unroll: whether the program has each layer by itself instead of a loop over them;
    what a loop keeps for its backward pass is copied into stacks and out again. None: on one GPU, where nothing is
    rematerialized."""

    def __init__(self, config: LlamaConfig, vocab_size: int, *, dtype: jnp.dtype = jnp.float32, remat: str = "none",
                 attention: str = "auto", unroll: bool | None = None, rngs: nnx.Rngs):  # fmt: skip
        if config.width % config.heads or config.heads % config.kv_heads or config.head_dim % 2:
            raise ValueError(
                f"Llama: width {config.width}, {config.heads} heads, {config.kv_heads} key-value heads. The heads must"
                " divide the width into even parts, and the key-value heads must divide the heads."
            )

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs):
            return Block(config, dtype=dtype, attention=attention, rngs=rngs)

        self.config = config
        self.remat = remat
        self.unroll = unroll
        self.placement = None  # on a mesh: says where activations lie and weights are used, see recipes/layout.py
        self.vocab_size = vocab_size
        embed_init = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(vocab_size, config.width, dtype=dtype, embedding_init=embed_init, rngs=rngs)
        self.blocks = stack(rngs)
        self.norm = nnx.RMSNorm(config.width, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.lm_head = linear(config.width, vocab_size, config, dtype, rngs)

    def __call__(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time vocab"]:
        rotary = self._rotary(tokens.shape[1])

        def layer(x, block):
            placed = self._placed("blocks", block)
            placed = lb.nn.keep_codes(placed) if self.remat == "codes" else placed
            x = placed(self._cut(x), rotary)
            if placed is not block and self._calibrating():  # the scales that it set are in a copy
                nnx.update(block, nnx.state(placed, nnx.PathContains("lhs_scale")))
            return x

        if self.remat != "none":
            layer = nnx.remat(layer, policy=remat_policy(self.remat))
        x = nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, unroll=self._unrolls(tokens))(
            self._placed("embed", self.embed)(tokens), self.blocks
        )
        return self._placed("lm_head", self.lm_head)(self.norm(self._cut(x))).astype(jnp.float32)

    def init_cache(self, batch: int, positions: int, bits: int | None = None) -> KVCache:
        """Room for the keys and values of so many positions, with a leading axis of layers; bits: 2 to 8, or floats."""
        config, dtype = self.config, self.norm.dtype or jnp.float32
        rounded = kv_cache.quantizer(bits, config.head_dim)
        one = kv_cache.empty((batch, positions, config.kv_heads, config.head_dim), dtype, rounded)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (config.layers, *leaf.shape)), one)

    def extend(
        self, tokens: Int[Array, "batch time"], cache: KVCache, at: Int[Array, ""]
    ) -> tuple[Float[Array, "batch time vocab"], KVCache]:
        """The logits of `tokens`, which stand at the positions from `at` on, and the cache with them; on one device. It
        holds the positions before `at`, and room for these. Raises: ValueError for more tokens than positions."""
        room = jax.tree.leaves(cache)[0].shape[2]
        if tokens.shape[1] > room:
            raise ValueError(
                f"Llama.extend: {tokens.shape[1]} tokens, and the cache has {room} positions. Make a longer one by"
                " init_cache, or read fewer at a time."
            )
        table = self._rotary(room)
        rotary = jax.lax.dynamic_slice_in_dim(table, at, tokens.shape[1], axis=1)
        layer = lambda x, block, cache: block.extend(x, rotary, cache, at)
        x, cache = nnx.scan(layer, in_axes=(nnx.Carry, 0, 0), out_axes=(nnx.Carry, 0))(
            self.embed(tokens), self.blocks, cache
        )
        return self.lm_head(self.norm(x)).astype(jnp.float32), cache

    def _rotary(self, time: int) -> Float[Array, "2 time half"]:
        size = self.config
        return rotary_table(time, size.head_dim, size.rope_theta, size.rope_scaling)

    def _unrolls(self, tokens: Array) -> bool:
        if self.unroll is not None:
            return self.unroll
        return self.remat == "none" and backend.sees_gpu() and backend.why_partitioned(tokens) is None

    def _placed(self, name: str, module):
        if self.placement is None:
            return module
        return self.placement.whole_weights(name, module, everywhere=self._calibrating())

    def _cut(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        return x if self.placement is None else self.placement.cut_batch(x, everywhere=self._calibrating())

    def _calibrating(self) -> bool:
        """Whether `lb.calibrate` runs: every device then computes the whole, so that what is learned from it is what
        one device learns."""
        return any(getattr(module, "calibrating", False) for _, module in nnx.iter_modules(self))


def remat_policy(remat: str):
    """What a rematerialized layer keeps for its backward pass: nothing; what its products answer (and not what the
    rotations inside a quantized one do); or the codes of quantized operands, so that only the products run again and
    nothing is rotated and rounded twice. Raises: ValueError for another word."""
    keep = jax.checkpoint_policies.save_only_these_names
    policies = {"full": None, "products": keep(PRODUCT), "codes": keep(lb.nn.CODES)}
    if remat not in policies:
        raise ValueError(f"Llama: remat {remat!r} is unknown; choose one of none, {', '.join(policies)}.")
    return policies[remat]


class Block(nnx.Module):
    def __init__(self, config: LlamaConfig, *, dtype: jnp.dtype, attention: str = "auto", rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(config.width, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, dtype=dtype, implementation=attention, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(config.width, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.mlp = SwiGLU(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch time width"], rotary) -> Float[Array, "batch time width"]:
        x = x + self.attention(self.attention_norm(x), rotary)
        return x + self.mlp(self.mlp_norm(x))

    def extend(
        self, x: Float[Array, "batch time width"], rotary, cache: KVCache, at: Int[Array, ""]
    ) -> tuple[Array, KVCache]:
        mixed, cache = self.attention.extend(self.attention_norm(x), rotary, cache, at)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache


class Attention(nnx.Module):
    def __init__(self, config: LlamaConfig, *, dtype: jnp.dtype, implementation: str = "auto", rngs: nnx.Rngs):
        if implementation not in ATTENTION:
            raise ValueError(f"Llama: attention {implementation!r} is unknown; choose one of {', '.join(ATTENTION)}.")
        self.implementation = implementation
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.qkv = linear(config.width, (self.heads + 2 * self.kv_heads) * self.head_dim, config, dtype, rngs)
        self.out = linear(self.heads * self.head_dim, config.width, config, dtype, rngs)

    def __call__(self, x: Float[Array, "batch time width"], rotary) -> Float[Array, "batch time width"]:
        return self._out(attend(*self._heads(x, rotary), self.implementation))

    def extend(
        self, x: Float[Array, "batch time width"], rotary, cache: KVCache, at: Int[Array, ""]
    ) -> tuple[Array, KVCache]:
        q, k, v = self._heads(x, rotary)
        cache = kv_cache.written(cache, k, v, at)
        return self._out(kv_cache.attended(q, cache, at)), cache

    def _heads(self, x: Float[Array, "batch time width"], rotary) -> tuple[Array, Array, Array]:
        """Query, key and value, the first two turned by their positions."""
        heads = checkpoint_name(self.qkv(x), PRODUCT).reshape(
            *x.shape[:2], self.heads + 2 * self.kv_heads, self.head_dim
        )
        q, k, v = jnp.split(heads, [self.heads, self.heads + self.kv_heads], axis=2)
        return rotate(q, rotary), rotate(k, rotary), v

    def _out(self, mixed: Float[Array, "batch time heads dim"]) -> Float[Array, "batch time width"]:
        return checkpoint_name(self.out(mixed.reshape(*mixed.shape[:2], -1)), PRODUCT)


def attend(
    q: Float[Array, "batch time heads dim"], k: Float[Array, "batch time kv_heads dim"],
    v: Float[Array, "batch time kv_heads dim"], implementation: str = "auto",
) -> Float[Array, "batch time heads dim"]:  # fmt: skip
    """Causal attention. "auto" takes cuDNN on one NVIDIA GPU of compute capability 8.0 or later for 16-bit heads of a
    multiple of 8 up to 128 and a multiple of 64 positions, XLA elsewhere."""
    chosen: Literal["cudnn", "xla"] = "cudnn" if implementation == "cudnn" else "xla"
    if implementation == "auto":
        fits = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[3] % 8 == 0 and q.shape[3] <= 128
        fits = fits and q.shape[1] % 64 == 0 and jax.default_backend() == "gpu"
        chosen = "cudnn" if fits and backend.sees_gpu() and backend.why_partitioned(q) is None else "xla"
    dtype = q.dtype
    if dtype == jnp.float16 and jax.default_backend() == "cpu":  # which has no float16 products summed in float32
        q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=chosen).astype(dtype)


class SwiGLU(nnx.Module):
    """down(silu(gate) * up). Source: Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, config: LlamaConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.gate_up = linear(config.width, 2 * config.ffn, config, dtype, rngs)
        self.down = linear(config.ffn, config.width, config, dtype, rngs)

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        gate_up = checkpoint_name(self.gate_up(x), PRODUCT)
        # the barrier has their cotangent written once, where both backward products read it, and not in halves before
        gate, up = jnp.split(jax.lax.optimization_barrier(gate_up), 2, axis=-1)
        return checkpoint_name(self.down(nnx.silu(gate) * up), PRODUCT)


def linear(size_in: int, size_out: int, config: LlamaConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    inits = {"fan_in": nnx.initializers.lecun_normal(), "0.02": nnx.initializers.normal(0.02)}
    if config.init not in inits:
        raise ValueError(f"Llama: init {config.init!r} is unknown; choose one of {', '.join(inits)}.")
    return nnx.Linear(size_in, size_out, use_bias=False, kernel_init=inits[config.init], dtype=dtype, rngs=rngs)


def rotary_table(
    time: int, head_dim: int, theta: float, scaling: tuple[float, float, float, float] | None = None
) -> Float[Array, "2 time half"]:
    """Cosine and sine of position * theta**(-2i/head_dim). Source: Su et al. 2021, arXiv:2104.09864.

    scaling: (factor, low, high, positions), for more positions than a model was first trained with: a frequency that
    turns less than `low` times in those is divided by the factor, one that turns more than `high` times stays, between
    the two it is a mixture (Llama 3.1; Grattafiori et al. 2024, arXiv:2407.21783, and its released code)."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None:
        factor, low, high, positions = scaling
        kept = jnp.clip((positions * frequency / (2 * jnp.pi) - low) / (high - low), 0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    angle = jnp.arange(time, dtype=jnp.float32)[:, None] * frequency[None, :]
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)])


def rotate(x: Float[Array, "batch time heads dim"], rotary) -> Float[Array, "batch time heads dim"]:
    """Turns each pair (x[i], x[i + dim/2]) by its position's angle, in float32."""
    cos, sin = rotary[0][None, :, None, :], rotary[1][None, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
