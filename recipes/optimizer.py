"""AdamW with a one-cycle rate, as the QuEST runs use it (Panferov et al. 2025, arXiv:2502.05003, section 4)."""

import dataclasses
import math

import jax
import optax

import lowbit_jax as lb


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """Gradient clipped to a norm of `clip`; betas 0.9 and 0.95; decoupled decay of the block matrices only.

    bits: of the moments, as `lb.optim.low_bit_state` takes them (those of the embedding stay in float32); None keeps
    float32. param_dtype: what parameters are stored in; below float32 their steps are rounded stochastically, drawn
    from `seed`, and there is no other copy.
    loss_scale: gradients are those of a loss times a factor that follows them."""

    peak: float
    steps: int
    warmup: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    bits: int | str | None = None
    param_dtype: str = "float32"
    loss_scale: bool = False
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.weight_decay < math.inf or not 0 < self.clip < math.inf:
            raise ValueError(
                f"optimizer.AdamW: weight decay {self.weight_decay}, clip {self.clip}. The decay must be finite and 0"
                " or more, the clip finite and above 0."
            )

    def schedule(self) -> optax.Schedule:
        return one_cycle(self.peak, self.steps, self.warmup)

    def transformation(self) -> optax.GradientTransformation:
        elementwise = (
            optax.scale_by_adam(b1=0.9, b2=0.95),
            optax.add_decayed_weights(self.weight_decay, mask=decayed),
            optax.scale_by_learning_rate(self.schedule()),
        )
        if self.bits is not None:  # all of it, which then goes over memory once
            elementwise = (lb.optim.low_bit_state(optax.chain(*elementwise), self.bits),)
        tx = optax.chain(optax.clip_by_global_norm(self.clip), *elementwise)
        tx = lb.optim.dynamic_loss_scale(tx) if self.loss_scale else tx
        return tx if self.param_dtype == "float32" else lb.optim.stochastic_rounding(tx, key=self.seed)

    @property
    def stays_finite(self) -> bool:
        """Whether a finite gradient moves finite parameters by a finite update, so that nobody has to look for one that
        is not, which takes a pass over all of them: no moment exceeds the clipped gradient's, each is divided by its
        own root and epsilon, and the decay takes no more than the parameter."""
        return self.bits is None and self.param_dtype == "float32" and self.weight_decay <= 1 and self.clip <= 1e9

    def stored(self, params):
        """The parameters in the dtype that they are kept in."""
        return params if self.param_dtype == "float32" else jax.tree.map(lambda p: p.astype(self.param_dtype), params)


def one_cycle(peak: float, steps: int, warmup: float = 0.1) -> optax.Schedule:
    """Cosine from peak/100 up to peak over the share `warmup`, cosine down to peak/10 at the last step."""
    if not 0 < peak < math.inf or steps < 1 or not 0 < warmup < 1:
        raise ValueError(
            f"optimizer.one_cycle: rate {peak}, {steps} steps, warm-up {warmup}. The rate must be finite and above"
            " 0, the steps above 0, the warm-up a share between 0 and 1."
        )
    rise = max(1, round(warmup * steps))
    up = optax.cosine_decay_schedule(-0.99 * peak, rise)  # from -0.99 peak to 0; a peak on top makes peak/100 to peak
    down = optax.cosine_decay_schedule(peak, max(1, steps - 1 - rise), alpha=0.1)
    return optax.join_schedules([lambda count: peak + up(count), down], [rise])


def decayed(params):
    """True for what decays: the matrices of the blocks and learned quantization steps; not embedding, head or norms."""

    def decays(path, _) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return "blocks/" in name and "norm" not in name

    return jax.tree_util.tree_map_with_path(decays, params)
