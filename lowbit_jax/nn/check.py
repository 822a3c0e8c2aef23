"""What is checked before a layer is quantized: its shapes (the quantizers are tried on them) and its class."""

import dataclasses
import dis
import functools
import inspect
import math
import types
from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowbit_jax.nn.site import Site, initial_scales, operand, stacked
from lowbit_jax.nn.weight import ready_weight
from lowbit_jax.ops import Gemm, LinearRecipe, dot_general
from lowbit_jax.ops.conv import refuse_backward
from lowbit_jax.scaling import Block, Group, PerRow, PerTensor


def check_site(site: Site, recipe: LinearRecipe, kernel: Array | jax.ShapeDtypeStruct, where: str) -> None:
    """Raises what quantizing would raise (a group that does not divide, a dtype), with the layer's name."""
    try:
        _try(dataclasses.replace(site, path=""), recipe, tuple(kernel.shape), jnp.dtype(kernel.dtype))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise type(error)(f"{where}, weight {kernel.dtype}{list(kernel.shape)}: {error}") from error


@functools.lru_cache(maxsize=1024)  # models repeat their layers
def _try(site: Site, recipe: LinearRecipe, shape: tuple[int, ...], dtype: Any) -> None:
    jax.eval_shape(lambda kernel: _quantize_all(kernel, recipe, site), jax.ShapeDtypeStruct(shape, dtype))
    known = all(isinstance(q.tiling, PerTensor | PerRow | Group | Block) for q in recipe.quantizers)
    if site.kind != "embedding" and not recipe.plain_backward and not recipe.learned and known:
        jax.eval_shape(lambda: _differentiate(recipe.with_implementation("reference"), site, dtype))


def _quantize_all(kernel: Array, recipe: LinearRecipe, site: Site):
    scales = {side: value.reshape(-1)[0] for side, value in initial_scales(recipe, site, kernel).items()}
    key = jax.random.key(0) if recipe.needs_key else None
    alone = dataclasses.replace(recipe, out=Gemm(rhs=recipe.out.rhs)) if recipe.fresh_signs else recipe
    one = lambda k: ready_weight(k, alone, site, scale=scales.get("rhs"), key=key)
    weight = stacked(one, kernel, site)(kernel)
    if recipe.out.lhs is None:
        return weight
    size = site.shape[-2] if site.kind == "conv_general_dilated" else site.length
    return weight, operand(recipe, "lhs")(jnp.zeros((_tokens(recipe), size)), key=key, scale=scales.get("lhs"))


def _tokens(recipe: LinearRecipe) -> int:
    """A number of tokens that every tile and support of the recipe divides."""
    sides = []
    for quantizer in recipe.quantizers:
        tiling, support = quantizer.tiling, quantizer.sparsity
        sides += [tiling.size] if isinstance(tiling, Group | Block) else []
        sides += [tiling.other] if isinstance(tiling, Block) else []
        sides += [support.group] if support is not None else []
    return math.lcm(*sides)


def _differentiate(recipe: LinearRecipe, site: Site, dtype: Any):
    """The product and both of its backward products, which cut the weight along its outputs and cut the tokens."""
    if site.kind == "conv_general_dilated":
        refuse_backward(recipe)
    contracted = tuple(range(1, 1 + len(site.contract)))
    x = jnp.zeros((_tokens(recipe), *(site.shape[axis] for axis in site.contract)), dtype)
    key = jax.random.key(0) if recipe.needs_key else None
    product = lambda x, w: dot_general(x, w, ((contracted, site.contract), ((), ())), recipe=recipe, key=key)
    y, back = jax.vjp(product, x, jnp.zeros(site.shape, dtype))
    return back(y)


_READERS = {"param", "variable", "get_variable"}  # of linen.Module


def check_subclass(layer: Any, base: type, where: str) -> None:
    """Raises where a subclass reads the weight in code of its own, a product that the quantizer would not see."""
    weight = "embedding" if base.__name__ == "Embed" else "kernel"
    for klass in type(layer).__mro__[: type(layer).__mro__.index(base)]:
        if readers := _READERS & set(vars(klass)) & set(dir(base)):
            raise ValueError(
                f"{where}: {klass.__name__}.{min(readers)} decides what the layer receives for its `{weight}`, which"
                " packing would not see. Change the parameter itself, or leave the layer out by a rule."
            )
        for name, member in vars(klass).items():
            if name != "__init__" and weight in _names_used(member):
                raise ValueError(
                    f"{where}: {klass.__name__}.{name} uses `{weight}` itself, and that product would stay in high"
                    " precision."
                    f" Let it call super().__call__, or leave the layer out by a rule and use lb.dot_general in {name}."
                )


def check_owner(owner: type, weights: Iterable[str], where: str) -> None:
    """Raises where a module that holds quantized layers, whose parameters have the names `weights`, multiplies by one
    in a method of its own, a product that the quantizers would not see (one with `recipe=`, by `lb.dot_general`, is
    quantized).

    Code outside the module's classes is not seen; `lb.explain(model, *args).missing` is."""
    for weight in sorted(set(weights)):
        if method := _multiplies(owner, weight):
            instead = "its `attend`" if weight == "embedding" else "the layer"
            raise ValueError(
                f"{where}: {method} multiplies by {'an' if weight == 'embedding' else 'a'} `{weight}` itself, and that"
                f" product would stay in high precision. Call {instead} instead, or use lb.dot_general(..., recipe=...)"
                " there."
            )


@functools.lru_cache(maxsize=1024)
def _multiplies(owner: type, weight: str) -> str | None:
    """The method of the class, or of one above it, that takes a product with such a parameter and no recipe."""
    for klass in owner.__mro__:
        if klass.__module__.partition(".")[0] in ("flax", "builtins"):
            continue
        for name, member in vars(klass).items():
            used = _names_used(member)
            if weight in used and "recipe" not in used and (used & _PRODUCTS or _MATMUL in used):
                return f"{klass.__name__}.{name}"
    return None


def carried(value: Any, wanted: Collection[int]) -> Any | None:
    """The first object, of those with a `wanted` id, that a callable, or one in a container, carries along: what it is
    bound to, in its closure, its defaults, a partial's arguments, or in what it wraps."""
    pending = [held for one in _members(value) for held in _held_by(one)]
    seen: dict[int, Any] = {}  # keeps what it names, so that no id comes twice
    while pending:
        held = pending.pop()
        if id(held) in wanted:
            return held
        if id(held) not in seen:
            seen[id(held)] = held
            pending += _members(held) if isinstance(held, dict | tuple | list) else _held_by(held)
    return None


def _members(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, tuple | list) else [value]


def _held_by(value: Any) -> list[Any]:
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if not inspect.isroutine(value) and not hasattr(value, "__wrapped__"):
        return []
    cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or () if cell != types.CellType()]
    names = ("__self__", "__wrapped__", "__defaults__", "__kwdefaults__")
    return [*cells, *(held for name in names if (held := getattr(value, name, None)) is not None)]


_PRODUCTS = {
    "dot", "matmul", "einsum", "tensordot", "vdot", "inner", "matvec", "vecmat", "vecdot", "multi_dot", "convolve",
    "dot_general", "ragged_dot", "ragged_dot_general", "scaled_dot", "batch_matmul", "scaled_matmul",
    "conv", "conv_general_dilated", "conv_with_general_padding", "conv_transpose", "conv_general_dilated_local",
}  # fmt: skip
_MATMUL = "@"


def _names_used(member: Any) -> set[str]:
    """Names, strings and keywords in the code of a function, a property, or what wraps one, and "@" for a matrix
    product; its docstring is no name."""
    member = (
        getattr(member, "fget", None) or getattr(member, "__func__", None) or getattr(member, "func", None) or member
    )
    code = getattr(inspect.unwrap(member) if callable(member) else member, "__code__", None)
    names, pending = set(), [code] if code else []
    while pending:
        code = pending.pop()
        names |= set(code.co_names) | {c for c in code.co_consts if isinstance(c, str)}
        names |= {word for c in code.co_consts if isinstance(c, tuple) for word in c if isinstance(word, str)}
        if any(i.opname == "BINARY_OP" and i.argrepr in ("@", "@=") for i in dis.get_instructions(code)):
            names.add(_MATMUL)
        pending += [c for c in code.co_consts if inspect.iscode(c)]
    return names
