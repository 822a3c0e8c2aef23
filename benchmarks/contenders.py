"""The ways to quantize a model that are measured beside each other: ours, and the peers that are installed."""

import dataclasses
import importlib.util
from collections.abc import Callable

import jax
from flax import nnx

import lowbit_jax as lb

# (model, one input, attributes that hold the layers to quantize) -> the model with those layers quantized
Quantize = Callable[[nnx.Module, jax.Array, tuple[str, ...]], nnx.Module]


def float32(model: nnx.Module, x: jax.Array, layers: tuple[str, ...]) -> nnx.Module:
    """The reference that every other one is divided by."""
    del x, layers
    return model


def paths_of(layers: tuple[str, ...]) -> str:
    """The regular expression that both Qwix's rules and ours take for the modules held by these attributes."""
    return rf"(.*/)?({'|'.join(layers)})(/.*)?"


@dataclasses.dataclass(frozen=True)
class Ours:
    """`lb.quantize` with a recipe."""

    recipe: lb.LinearRecipe

    def __call__(self, model: nnx.Module, x: jax.Array, layers: tuple[str, ...]) -> nnx.Module:
        del x
        return lb.quantize(model, rules=[(paths_of(layers), self.recipe)])


def qwix_w4a4(model: nnx.Module, x: jax.Array, layers: tuple[str, ...]) -> nnx.Module:
    """Qwix, int4 weights and activations in the forward products. Its int4 products need 3-D inputs on the CPU."""
    import qwix

    rule = qwix.QtRule(module_path=paths_of(layers), weight_qtype="int4", act_qtype="int4")
    return qwix.quantize_model(model, qwix.QtProvider([rule]), x)


def aqt_w4a4(model: nnx.Module, x: jax.Array, layers: tuple[str, ...]) -> nnx.Module:
    """AQT, 4 bits in the forward products, through the `dot_general` of each layer."""
    from aqt.jax.v2 import config

    del x
    product = config.set_context(config.config_v4(fwd_bits=4, dlhs_bits=None, drhs_bits=None), key=None, train_step=0)

    def dot_general(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, out_sharding=None):
        del preferred_element_type, out_sharding  # not among AQT's arguments
        return product(lhs, rhs, dimension_numbers, precision=precision)

    named = lambda path, node: isinstance(node, nnx.Linear) and bool(set(layers) & {str(part) for part in path})
    return nnx.with_attributes(model, only=named, dot_general=dot_general)


def without_rotation(recipe: lb.LinearRecipe) -> lb.LinearRecipe:
    """The same recipe with the Hadamard transform left out, to see what the transform costs."""
    bare = lambda operand: dataclasses.replace(operand, rotation=None) if isinstance(operand, lb.Quantizer) else operand
    return dataclasses.replace(recipe, out=lb.Gemm(lhs=bare(recipe.out.lhs), rhs=bare(recipe.out.rhs)))


def installed(package: str) -> bool:
    """Whether `import package` would find something; nothing is imported."""
    return importlib.util.find_spec(package) is not None


def contenders() -> dict[str, Quantize]:
    """Name -> how to quantize; the first is the reference. Peers appear when they are installed."""
    found: dict[str, Quantize] = {
        "float32": float32,
        "quest_w4a4": Ours(lb.quest(4)),
        "quest_w4a4g8": Ours(lb.quest(4, backward=8)),  # the peers' backward products are not quantized
    }
    if installed("qwix"):
        found["qwix_w4a4"] = qwix_w4a4
    if installed("aqt"):
        found["aqt_w4a4"] = aqt_w4a4
    return found


def ablations() -> dict[str, Quantize]:
    """QuEST W4A4 taken apart: what each part adds to a float32 step."""
    quest = lb.quest(4)
    return {
        "float32": float32,
        "weights only": Ours(lb.quest(4, activations=False)),
        "activations only": Ours(lb.quest(4, weights=False)),
        "both, no rotation": Ours(without_rotation(quest)),
        "both, rotated": Ours(quest),
    }
