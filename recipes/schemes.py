"""From the words of a command line (method, bits, rules) to a quantized model."""

import dataclasses

import jax
from flax import nnx

import lowbit_jax as lb

Bits = int | str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """A method of `lb.methods` for the matrices of the blocks, after any rules. Embedding and head stay as they are."""

    method: str = "quest"
    bits: Bits | None = None  # 4 unless given
    weight_only: bool = False
    rules: tuple[str, ...] = ()

    def __post_init__(self):
        if self.method == "none" and (self.bits is not None or self.weight_only or self.rules):
            raise ValueError(
                "schemes: method 'none' quantizes nothing, so --bits, --weight-only and --rules cannot take effect."
            )

    @property
    def name(self) -> str:
        if self.method == "none":
            return "none"
        bits = 4 if self.bits is None else self.bits
        width = bits if isinstance(bits, str) else f"w{bits}a{16 if self.weight_only else bits}"
        return f"{self.method}-{width}" + ("-rules" if self.rules else "")

    def apply(self, model: nnx.Module, tokens: jax.Array) -> nnx.Module:
        """The quantized view of `model`, learned steps set from `tokens`; `model` itself for "none"."""
        if self.method == "none":
            return model
        recipe = self.recipe(self.method, 4 if self.bits is None else self.bits)
        model = lb.quantize(model, rules=[*map(self._rule, self.rules), ("blocks", recipe)])
        return lb.calibrate(model, tokens) if _learns(recipe) else model

    def recipe(self, method: str, bits: Bits) -> lb.LinearRecipe:
        options = {"activations": False} if self.weight_only else {}
        try:
            return lb.methods.get(method, bits=bits, **options)
        except TypeError as error:  # an option or width that this method does not have
            raise ValueError(f"schemes: {error}") from error

    def _rule(self, rule: str) -> tuple[str, lb.LinearRecipe | None]:
        """`pattern=method:bits`; the pattern is a regular expression over module paths, as `lb.quantize` reads it."""
        pattern, _, value = rule.rpartition("=")
        method, _, bits = value.partition(":")
        if not pattern or not method or (method == "none") == bool(bits):
            raise ValueError(
                f"schemes: {rule!r} is not pattern=method:bits or pattern=none, like blocks/mlp/down=quest:8."
            )
        if method == "none":
            return pattern, None
        return pattern, self.recipe(method, int(bits) if bits.isdigit() else bits)


def _learns(recipe: lb.LinearRecipe) -> bool:
    return any(quantizer is not None and quantizer.learned for quantizer in (recipe.out.lhs, recipe.out.rhs))
