"""Which parameters are treated alike: weight decay on matrices only, learned quantization steps by themselves."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lowbit_jax.optim import trees
from lowbit_jax.optim.moments import EMBEDDINGS

NOT_DECAYED = (
    *EMBEDDINGS,
    r"(^|/|_)head(/|$)",  # not heads, nor a multi_head_attention
    r"norm(alization)?s?(?![a-z])",  # a word, or the end of one as in rmsnorm; not normal_proj, nor renormalize
    r"(^|/|_)ln(_|\d|/|$)",
    r"(^|/|_)(scale|bias)(/|$)",
)
LEARNED_STEPS = (r"(^|/)(lhs|rhs)_scale$",)  # what `lb.quantize` names the scales of LSQ, PACT and their like


def decay_mask(
    *, excluded: Sequence[str] = NOT_DECAYED, learned_steps: bool = True, min_ndim: int = 2
) -> Callable[[Any], Any]:
    """A function of the parameters for `mask=` of optax: what decays, as in the QuEST runs.

    Matrices decay (`min_ndim` axes and more); embeddings, heads, norms and biases do not: what one of the regular
    expressions `excluded` finds in its path, in lower case. Learned quantization steps decay if `learned_steps`
    (QuEST's LSQ baseline decays them by 0.1).
    Source: Panferov et al. 2025 (QuEST), arXiv:2502.05003, the parameter groups of its code.
    Raises: ValueError when the mask is taken of parameters none of which would decay."""
    patterns = [re.compile(pattern) for pattern in excluded]
    labels = label_learned_steps()

    def mask(params: Any) -> Any:
        def decays(path: tuple, leaf: Any, label: str) -> bool:
            if label == "step":
                return learned_steps
            name = trees.name_of(path).lower()
            return leaf.ndim >= min_ndim and not any(p.search(name) for p in patterns)

        answer = jax.tree_util.tree_map_with_path(decays, params, labels(params), is_leaf=trees.is_packed)
        if jax.tree.leaves(params) and not any(jax.tree.leaves(answer)):
            names = ", ".join(list(trees.named_leaves(params))[:5])
            raise ValueError(
                f"decay_mask: nothing would decay among {names} ... . Pass other `excluded` patterns or min_ndim."
            )
        return answer

    return mask


def label_learned_steps(
    *, steps: Sequence[str] = LEARNED_STEPS, label: str = "step", other: str = "weight"
) -> Callable[[Any], Any]:
    """A function of the parameters for `optax.multi_transform`: "step" for learned scales, "weight" for the rest.

    `steps` are regular expressions searched in the paths. A learned step wants its own rate and decay:

        optax.multi_transform({"weight": optax.adamw(1e-3), "step": optax.adamw(1e-4, weight_decay=0.1)},
                              lb.optim.label_learned_steps())"""
    patterns = [re.compile(pattern) for pattern in steps]

    def labels(params: Any) -> Any:
        named = lambda path, _: label if any(p.search(trees.name_of_parameter(path)) for p in patterns) else other
        return jax.tree_util.tree_map_with_path(named, params, is_leaf=trees.is_packed)

    return labels
