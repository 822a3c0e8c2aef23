"""`lb.explain`: what a recipe or a quantized model computes, as a table; with inputs, what the compiled program ran."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowbit_jax.nn import kernels
from lowbit_jax.nn.compiled import Evidence, RanProduct
from lowbit_jax.nn.policy import Node
from lowbit_jax.nn.site import Site
from lowbit_jax.nn.weight import packed_weight, to_nearest
from lowbit_jax.ops import Gemm, LinearRecipe
from lowbit_jax.ops.recipe import Side
from lowbit_jax.qtensor import QTensor
from lowbit_jax.quantizer import Quantizer

PRODUCTS = {
    "out": ("activation", "weight"),
    "grad_lhs": ("cotangent", "weight"),
    "grad_rhs": ("activation", "cotangent"),
}
"""The three products of a layer and their two operands."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One operand of one product. bits: stored bits an element, with a weight's scales. ran: what was compiled."""

    layer: str
    product: str
    operand: str
    format: str
    tiling: str = ""
    fit: str = ""
    rounding: str = ""
    scale: str = ""
    rotation: str = ""
    sparsity: str = ""
    estimator: str = ""
    bits: float | None = None
    kernel: str = "xla"
    ran: str = ""

    @property
    def quantized(self) -> bool:
        return bool(self.tiling)


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """A quantized layer as Flax holds it. packed: its weight, if that is packed. stack: leading axes of layers stacked
    for a scan. dtype: of the weight; compute: of the product, where the layer sets one."""

    site: Site
    recipe: LinearRecipe
    packed: QTensor | None = None
    stack: tuple[int, ...] = ()
    dtype: Any = jnp.float32
    compute: Any = None


NOT_RUN = "did not run"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The table: `rows`, six a layer (two operands of three products), and the modules left in high precision.

    `str()` shows the quantized operands; `missing` names the layers that the compiled program does not hold. own_code:
    modules that multiply in code of their own, or behind a bridge to Flax's other API, in whatever precision. others:
    the products of the compiled forward program that belong to no layer of the table.
    no_gradient: why the gradient of the call could not be traced; the forward is then proved alone."""

    title: str
    rows: tuple[Row, ...]
    high_precision: tuple[str, ...] = ()
    proved: bool = False
    no_gradient: str = ""
    own_code: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """Layers whose forward product is not in the program compiled for the given inputs."""
        return tuple(dict.fromkeys(r.layer for r in self.rows if r.product == "out" and r.ran == NOT_RUN))

    def __str__(self) -> str:
        columns = [
            "layer",
            "product",
            "operand",
            "format",
            "tiling",
            "fit",
            "rounding",
            "scale",
            "rotation",
            "sparsity",
        ]
        columns += ["estimator", "bits", "kernel"] + (["ran"] if self.proved else [])
        shown = [row for row in self.rows if row.quantized or (row.operand == "cotangent" and row.ran)]
        if all(row.sparsity in ("", "dense") for row in shown):
            columns.remove("sparsity")
        lines = [self.title, *_table(columns, [[_cell(getattr(row, c)) for c in columns] for row in shown])]
        trainable = not any(row.kernel.endswith("packed") for row in shown)
        if shown and trainable and not any(row.quantized and row.product != "out" for row in shown):
            lines.append("gradients: a high-precision cotangent times the operands of the forward product")
        if self.no_gradient:
            lines.append(f"the forward alone was compiled, its gradient cannot be traced: {self.no_gradient}")
        if self.high_precision:
            lines.append("in high precision: " + ", ".join(self.high_precision))
        if self.own_code:
            lines.append("as their own code computes: " + ", ".join(self.own_code))
        if self.others:
            counted = collections.Counter(self.others)
            told = ", ".join(f"{n} times {words}" if n > 1 else words for words, n in counted.items())
            lines.append(f"other products in the forward program: {len(self.others)} ({told})")
        if self.missing:
            lines.append(f"NOT IN THE COMPILED PROGRAM: {', '.join(name or 'the module' for name in self.missing)}")
        return "\n".join(lines)

    __repr__ = __str__


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in [columns, *rows]) for i in range(len(columns))]
    line = lambda cells: "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
    return [line(columns), "  ".join("-" * width for width in widths), *map(line, rows)]


def recipe_rows(recipe: LinearRecipe, layer: Layer | None = None, evidence: Evidence | None = None) -> list[Row]:
    """Six rows: two operands of each of the three products."""
    rows = []
    for product, operands in PRODUCTS.items():
        gemm = getattr(recipe, product)
        sides: tuple[Side, Side] = ("lhs", "rhs")
        for side, operand in zip(sides, operands, strict=True):
            slots = dict(_slots(gemm, side, product, operand, recipe, layer))
            ran = _ran(evidence, product, layer) if evidence is not None and layer is not None else ""
            rows.append(Row(layer=layer.site.path if layer else "", product=product, operand=operand, ran=ran, **slots))
    return rows


def _slots(gemm: Gemm, side: Side, product: str, operand: str, recipe: LinearRecipe, layer: Layer | None) -> Iterable:
    quantizer, reused = gemm.quantizer(side), gemm.reads_forward(side)
    if quantizer is None:
        yield "format", ("codes of out" if gemm.fold else "as in out") if reused else "high precision"
        return
    length = _length(product, layer)
    words = quantizer.explain(length)
    yield "format", f"{words['format']} of out" if reused else words["format"]
    yield from ((name, words[name]) for name in ("tiling", "fit", "rounding", "rotation", "sparsity", "estimator"))
    corrected = f", {words['debias']}" if "debias" in words else ""
    yield "scale", words["scale_format"] + (" and zero point" if quantizer.zero_point else "") + corrected
    yield "bits", _bits(quantizer, product, operand, recipe, layer)
    if layer is not None and product == "out":
        which = kernels.of_product if operand == "weight" else kernels.of_activation
        yield "kernel", which(recipe, layer.site, layer.packed, layer.compute or layer.dtype)


def _length(product: str, layer: Layer | None) -> int | None:
    """Elements along the axis that is rotated, where the layer alone says so (grad_rhs sums over the batch)."""
    if layer is None or product == "grad_rhs":
        return None
    site = layer.site
    if product == "out":
        return site.shape[-2] if site.kind == "conv_general_dilated" else site.length
    outputs = [n for axis, n in enumerate(site.shape) if axis not in site.contract]
    return outputs[-1] if len(outputs) == 1 else None


def _bits(quantizer: Quantizer, product: str, operand: str, recipe: LinearRecipe, layer: Layer | None) -> float:
    """Bits of an element; for a weight of known shape those of its packed form, scales included."""
    if layer is None or (product, operand) != ("out", "weight"):
        return quantizer.element_bits()
    if layer.packed is not None:
        return layer.packed.bits_per_element
    kernel = jax.ShapeDtypeStruct(layer.site.shape, layer.dtype)
    scale = jnp.ones(()) if quantizer.learned else None
    try:
        nearest = to_nearest(recipe)
        packed = jax.eval_shape(lambda k: packed_weight(k, nearest, layer.site, scale=scale), kernel)
    except NotImplementedError:
        return quantizer.element_bits()
    return packed.bits_per_element


def _ran(evidence: Evidence, product: str, layer: Layer) -> str:
    found: list[RanProduct] = getattr(evidence, product).get(layer.site.tag, [])
    if found:
        return ", ".join(dict.fromkeys(ran.words for ran in found))
    if product == "out":
        return "rows" if layer.site.kind == "embedding" else NOT_RUN
    return "none" if evidence.gradients and layer.packed is None else ""


def explain_recipe(recipe: LinearRecipe) -> Explanation:
    return Explanation(f"recipe {recipe.name or 'without a name'}", tuple(recipe_rows(recipe)))


def explain_layers(
    title: str,
    layers: Sequence[Layer],
    kept: Sequence[Node],
    evidence: Evidence | None = None,
    no_gradient: str = "",
) -> Explanation:
    """The table of the quantized layers; `kept`: the other modules."""
    rows = [row for layer in layers for row in recipe_rows(layer.recipe, layer, evidence)]
    high = tuple(node.called for node in kept if node.layer or node.opaque and not node.own_code)
    own = tuple(node.called for node in kept if node.unknown)
    others = tuple(ran.words for ran in evidence.others) if evidence is not None else ()
    return Explanation(title, tuple(rows), high, evidence is not None, no_gradient, own, others)
