"""AdamW with a one-cycle rate, as the QuEST runs use it (Panferov et al. 2025, arXiv:2502.05003, section 4)."""

import dataclasses

import jax
import optax


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """Gradient clipped to a norm of `clip`; betas 0.9 and 0.95; decoupled decay of the block matrices only."""

    peak: float
    steps: int
    warmup: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0

    def schedule(self) -> optax.Schedule:
        return one_cycle(self.peak, self.steps, self.warmup)

    def transformation(self) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.scale_by_adam(b1=0.9, b2=0.95),
            optax.add_decayed_weights(self.weight_decay, mask=decayed),
            optax.scale_by_learning_rate(self.schedule()),
        )


def one_cycle(peak: float, steps: int, warmup: float = 0.1) -> optax.Schedule:
    """Cosine from peak/100 up to peak over the share `warmup`, cosine down to peak/10 at the last step."""
    if peak <= 0 or steps < 1 or not 0 < warmup < 1:
        raise ValueError(
            f"optimizer.one_cycle: rate {peak}, {steps} steps, warm-up {warmup}. The rate and steps must be above 0,"
            " the warm-up a share between 0 and 1."
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
