"""Which layer follows which recipe: ordered rules over the paths of modules.

A rule is `(pattern, recipe)`. The pattern is a regular expression that must match the whole path of a module
(`re.fullmatch`; path parts are joined by "/", as in "blocks/0/attention/query"); it names that module and everything
inside it. The first rule that names a layer decides: its recipe, or `None` for high precision. Layers that no rule
names follow the default.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lowbit_jax.methods import quest
from lowbit_jax.ops import LinearRecipe

Rules = Sequence[tuple[str, LinearRecipe | None]]


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """Checked rules and the recipe of the layers that none of them names; hashable."""

    rules: tuple[tuple[str, LinearRecipe | None], ...] = ()
    default: LinearRecipe | None = None

    def names(self, index: int, path: str) -> bool:
        """Whether rule `index` matches exactly this path."""
        return re.fullmatch(self.rules[index][0], path) is not None

    def deciding(self, path: str, by_name: bool = False) -> int | None:
        """The first rule that matches `path` or a module around it; None when it is left to the default. by_name: a
        recipe has to name `path` itself (`Node.by_name`)."""
        around = parents(path)
        for index in range(len(self.rules)):
            seen = around if not by_name or self.rules[index][1] is None else around[-1:]
            if any(self.names(index, p) for p in seen):
                return index
        return None

    def recipe(self, path: str, by_name: bool = False) -> LinearRecipe | None:
        index = self.deciding(path, by_name)
        if index is None:
            return None if by_name and path else self.default
        return self.rules[index][1]


def parents(path: str) -> list[str]:
    """The path and the paths of the modules around it, outermost first; the root "" only for itself."""
    parts = path.split("/")
    return ["/".join(parts[: n + 1]) for n in range(len(parts))]


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """One module as the rules see it. `paths`: more than one where a module is shared. `layer`: it can be quantized.
    `by_name`: only where a rule names it itself, or it is the whole model, as an embedding, which methods leave alone.
    `opaque`: names of the parameters of its own that enter products which cannot be quantized. `own_code`: its class is
    none of Flax's. `bridge`: how to quantize what it holds, where it is a bridge to the other API."""

    paths: tuple[str, ...]
    kind: str
    layer: bool = False
    by_name: bool = False
    opaque: tuple[str, ...] = ()
    own_code: bool = False
    bridge: str = ""

    @property
    def unknown(self) -> bool:
        """Whether its products are its own affair: a recipe may be in them or not."""
        return bool(self.bridge or self.opaque and self.own_code)

    @property
    def called(self) -> str:
        return f"{self.paths[0] or 'the module'} ({self.kind})"


def make_policy(recipe: Any, rules: Any, who: str = "lb.quantize") -> Policy:
    """Checks the arguments of `lb.quantize`.

    An omitted recipe means QuEST at 4 bits, unless some rule brings a recipe: then it means high precision, so that
    rules which say what to quantize quantize that and no more.
    Raises: TypeError and ValueError for anything but a recipe and rules."""
    if rules is None:
        rules = ()
    if isinstance(rules, Mapping):
        rules = tuple(rules.items())
    if isinstance(rules, str) or not isinstance(rules, Iterable):
        raise TypeError(
            f"{who}(rules={rules!r}): give a list of (path pattern, recipe or None), as in [('head', None)]."
        )
    checked = tuple(_checked_rule(rule, who) for rule in rules)
    if recipe is None:
        recipe = None if any(r is not None for _, r in checked) else quest(4)
    else:
        check_recipe(recipe, f"{who}(recipe)")
    return Policy(rules=checked, default=recipe)


def _checked_rule(rule: Any, who: str) -> tuple[str, LinearRecipe | None]:
    if not isinstance(rule, tuple | list) or len(rule) != 2 or not isinstance(rule[0], str):
        raise TypeError(f"{who}: the rule {rule!r} is not a pair (path pattern, recipe or None), as in ('head', None).")
    pattern, recipe = rule
    if re.search(r"\(\?<?!", pattern):
        raise ValueError(
            f"{who}: the rule {pattern!r} uses a negative lookaround. A rule names modules and all that is inside"
            " them, so"
            " 'all but' is written as an earlier rule with None: [('head', None), ('.*', recipe)]."
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{who}: the rule {pattern!r} is not a regular expression ({error}). For a glob such as '*mlp*' write"
            " '.*mlp.*'."
        ) from error
    if recipe is not None:
        check_recipe(recipe, f"{who}: the rule {pattern!r}")
    return pattern, recipe


def check_recipe(recipe: Any, who: str) -> None:
    """Raises TypeError with the way out for what is no recipe, ValueError for one that quantizes nothing or that would
    make zeros of all negative weights."""
    if isinstance(recipe, LinearRecipe):
        if recipe == dataclasses.replace(LinearRecipe(), name=recipe.name):
            raise ValueError(
                f"{who} got a recipe that quantizes no operand. Use lb.quest(4), or None for high precision."
            )
        weight = recipe.forward_quantizers[1]
        if weight is not None and weight.format.min_finite >= 0 and not weight.zero_point:
            raise ValueError(
                f"{who} has {weight.format.name} for weights, which holds no negative value, so half of them would"
                f" be 0. Use a signed format, such as lb.formats.INT{weight.format.bits}, or zero_point=True."
            )
        return
    if isinstance(recipe, bool) or not isinstance(recipe, int | str):
        way = "a LinearRecipe, such as lb.quest(4)"
        if hasattr(recipe, "format"):
            way = "a LinearRecipe, which says where a quantizer goes: lb.LinearRecipe(out=lb.Gemm(lhs=q, rhs=q))"
        elif callable(recipe):
            way = f"the LinearRecipe that the function returns: {getattr(recipe, '__name__', 'recipe')}(...)"
    elif isinstance(recipe, int):
        way = f"a LinearRecipe, not a number of bits: lb.quest({recipe})"
    else:
        way = f"a LinearRecipe, not a name: lb.methods.get({recipe!r})"
    shown = f"a {type(recipe).__name__}" if dataclasses.is_dataclass(recipe) else repr(recipe)
    raise TypeError(f"{who} got {shown}. Pass {way}.")


def assign(policy: Policy, nodes: Sequence[Node], who: str = "lb.quantize") -> dict[str, LinearRecipe]:
    """Recipe of each layer to quantize, under each of its paths.

    Raises: ValueError for a rule that matches nothing, takes nothing, or names what cannot be quantized; when a shared
    layer gets two recipes; when nothing is left to quantize."""
    layers = [node for node in nodes if node.layer]
    assigned: dict[str, LinearRecipe] = {}
    deciding: dict[int, int] = {}
    for node in layers:
        choices = {policy.recipe(path, node.by_name) for path in node.paths}
        if len(choices) > 1:
            raise ValueError(
                f"{who}: {' and '.join(node.paths)} are one shared layer, and the rules give it different recipes."
                " Name both paths in one rule."
            )
        for path in node.paths:
            index = policy.deciding(path, node.by_name)
            if index is not None:
                deciding[index] = deciding.get(index, 0) + 1
        (recipe,) = choices
        if recipe is not None:
            assigned |= dict.fromkeys(node.paths, recipe)
    for index in range(len(policy.rules)):
        check_rule(policy, index, nodes, deciding.get(index, 0), who)
    if not layers:
        kinds = sorted({node.kind for node in nodes})
        raise ValueError(
            f"{who} found no layer that it can quantize among {', '.join(kinds)}. It quantizes Flax's Linear,"
            " LinearGeneral, Einsum and Conv (Dense, DenseGeneral in Linen), Embed where a rule names it, and the"
            f" models and attention made of them; in code of your own call lb.dot_general.{bridges_told(nodes)}"
        )
    if not assigned:
        only = "" if not all(node.by_name for node in layers) else f" (embeddings: name {layers[0].paths[0]!r} in one)"
        raise ValueError(
            f"{who}: the rules leave all {len(layers)} layers in high precision. Pass a recipe or drop a rule{only}."
        )
    return assigned


def check_rule(policy: Policy, index: int, nodes: Sequence[Node], taken: int, who: str) -> None:
    """Raises ValueError where rule `index`, which decided `taken` layers, has no effect. Modules that it passes over on
    its way to layers compute as their own code does, and `lb.explain` names them."""
    pattern, recipe = policy.rules[index]
    named = [node for node in nodes if any(policy.names(index, p) for p in node.paths)]
    if not named:
        raise ValueError(unmatched(pattern, [p for node in nodes for p in node.paths], who))
    seen = lambda node, path: [path] if node.by_name else parents(path)
    inside = [n for n in nodes if n.layer and any(policy.names(index, q) for p in n.paths for q in seen(n, p))]
    if not taken and inside:
        raise ValueError(
            f"{who}: the rule {pattern!r} has no effect: rules before it decide all it names ({_listed(inside)})."
            " The first rule that names a layer decides; put special cases first."
        )
    if recipe is None:
        return
    bridges = [n for n in nodes if n.bridge and any(policy.deciding(p) == index for p in n.paths)]
    if bridges and not taken:
        raise ValueError(f"{who}: the rule {pattern!r} names nothing that it can quantize.{bridges_told(bridges)}")
    if not taken:
        wrong = [n for n in named if n.opaque] or named
        what = "; ".join(f"{n.paths[0] or 'the model'!s} is {_kind(n)}" for n in wrong[:3])
        raise ValueError(
            f"{who}: the rule {pattern!r} names nothing but what cannot be quantized: {what}. Let it name layers too,"
            " or drop it; in code of your own call lb.dot_general with a recipe."
        )


def bridges_told(nodes: Iterable[Node]) -> str:
    """The way out for bridges to Flax's other API, after an error; empty where there is none."""
    bridges = [node for node in nodes if node.bridge]
    if not bridges:
        return ""
    first = bridges[0]
    name = f"{first.paths[0]!r} ({first.kind})" if first.paths[0] else f"This {first.kind}"
    return f" {name} is a bridge, which it does not enter: quantize what is inside, as in {first.bridge}."


def _kind(node: Node) -> str:
    owns = f" with its own {', '.join(node.opaque)}" if node.opaque else ""
    return f"{'an' if node.kind[:1] in 'AEIOU' else 'a'} {node.kind}{owns}"


def _listed(nodes: Sequence[Node]) -> str:
    names = [node.paths[0] for node in nodes]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def unmatched(pattern: str, paths: Sequence[str], who: str) -> str:
    """The error for a rule that matches nothing, with the nearest paths and, for a glob, the expression meant."""
    paths = sorted({p for p in paths if p})
    glob = "".join(".*" if c == "*" else re.escape(c) for c in pattern)
    hint = ""
    if "*" in pattern and any(re.fullmatch(glob, p) for p in paths):
        hint = f" Patterns are regular expressions: for this glob write {glob!r}."
    elif any(re.search(pattern, p) for p in paths):
        hint = f" A pattern must match the whole path: did you mean {'.*' + pattern + '.*'!r}?"
    near = difflib.get_close_matches(pattern, paths, n=4, cutoff=0.4) or paths[:6]
    known = f"paths such as {', '.join(map(repr, near))}" if near else "no module below its root"
    return f"{who}: the rule {pattern!r} matches nothing. The model has {known}.{hint}"
