"""From the words of a command line (method, bits, rules) to a quantized model."""

import dataclasses
from typing import Any

import numpy as np
from flax import nnx

import lowbit_jax as lb

Bits = int | str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """A method of `lb.methods` for the matrices of the blocks, after any rules. Embedding and head stay as they are."""

    method: str = "quest"
    bits: Bits | None = None  # the method's default, 4 for most
    weight_only: bool = False
    rules: tuple[str, ...] = ()
    backward: int | None = None  # bits of the cotangents; in high precision without
    options: tuple[str, ...] = ()  # more arguments of the method, as name=value

    def __post_init__(self):
        asked = self.bits is not None or self.weight_only or self.backward or self.rules or self.options
        if self.method == "none" and asked:
            raise ValueError(
                "schemes: method 'none' quantizes nothing, so --bits, --weight-only, --backward, --options and --rules"
                " cannot take effect."
            )

    @classmethod
    def of(cls, text: str) -> "Scheme":
        """From `method` or `method:option=value,option=value`."""
        method, _, rest = text.partition(":")
        options = list(filter(None, rest.split(",")))
        width = next((option for option in options if option.startswith("bits=")), None)
        if width is not None:
            options.remove(width)
        return cls(method=method, bits=width and _option(width)[1], options=tuple(options))

    @property
    def name(self) -> str:
        """Fit for a folder: quest-w4a4, lsq-w2a2, quest-w4a16, none."""
        if self.method == "none":
            return "none"
        named = lambda options: self._own_recipe(options).name.lower().replace(",", "").replace(" ", "-")
        without = lambda option: tuple(other for other in self.options if other != option)
        untold = [option for option in self.options if named(self.options) == named(without(option))]
        return "-".join([named(self.options), *(["rules"] if self.rules else []), *untold])

    def same_as(self, other: "Scheme") -> bool:
        """Whether both quantize the same layers by the same recipes, however they are written."""
        return self._all_rules() == other._all_rules()

    def apply(self, model: nnx.Module, tokens: np.ndarray) -> nnx.Module:
        """The quantized view of `model`, learned steps set from `tokens`; `model` itself for "none"."""
        quantized = self.quantized(model)
        return lb.calibrate(quantized, tokens) if any(map(_learns, self._all_rules())) else quantized

    def quantized(self, model: nnx.Module) -> nnx.Module:
        """As `apply`, but learned steps are those of a fresh model: for weights that come from elsewhere. The keys of
        stochastic roundings are the same whatever the seed of a run."""
        if self.method == "none":
            return model
        rules = self._all_rules()
        stochastic = any(recipe is not None and recipe.needs_key for _, recipe in rules)
        return lb.quantize(model, rules=rules, rngs=nnx.Rngs(quantize=0) if stochastic else None)

    def _all_rules(self) -> list[tuple[str, lb.LinearRecipe | None]]:
        if self.method == "none":
            return []
        return [*map(self._rule, self.rules), ("blocks", self._own_recipe(self.options))]

    def _own_recipe(self, options: tuple[str, ...]) -> lb.LinearRecipe:
        return self.recipe(self.method, self.bits, options)

    def recipe(self, method: str, bits: Bits | None, more: tuple[str, ...] = ()) -> lb.LinearRecipe:
        given = {"bits": bits, "activations": False if self.weight_only else None, "backward": self.backward}
        options = {name: value for name, value in given.items() if value is not None}
        for name, value in map(_option, more):
            if name in options:
                raise ValueError(f"schemes: the option {name!r} of {method!r} is given twice.")
            options[name] = value
        try:
            return lb.methods.get(method, **options)
        except TypeError as error:  # an option that this method does not have
            raise ValueError(f"schemes: {error}") from error

    def _rule(self, rule: str) -> tuple[str, lb.LinearRecipe | None]:
        """`pattern=method:bits`; the pattern is a regular expression over module paths, as `lb.quantize` reads it."""
        pattern, _, value = rule.rpartition("=")
        method, _, bits = value.partition(":")
        if not pattern or not method or (method == "none" and bits):
            raise ValueError(
                f"schemes: {rule!r} is not pattern=method:bits, pattern=method or pattern=none, like"
                " blocks/mlp/down=quest:8."
            )
        if method == "none":
            return pattern, None
        try:
            return pattern, self.recipe(method, int(bits) if bits.isdigit() else bits or None)
        except ValueError as error:
            raise ValueError(f"schemes: the rule {rule!r}: {error}") from error


def _option(text: str) -> tuple[str, Any]:
    """`name=value`: a whole number, true, false, none, or a word."""
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise ValueError(f"schemes: the option {text!r} is not name=value, like scaling=row or group=64.")
    words = {"true": True, "false": False, "none": None}
    return name, int(value) if value.isdigit() else words.get(value.lower(), value)


def _learns(rule: tuple[str, lb.LinearRecipe | None]) -> bool:
    quantizers = (rule[1].out.lhs, rule[1].out.rhs) if rule[1] else ()
    return any(isinstance(quantizer, lb.Quantizer) and quantizer.learned for quantizer in quantizers)
