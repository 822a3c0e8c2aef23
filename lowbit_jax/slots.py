"""What may stand in each slot of a `Quantizer`: an object with certain attributes, or a function."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """What may stand in a slot: an object with these attributes, or a function."""

    what: str
    attributes: tuple[str, ...] = ("__call__",)
    examples: Mapping[Any, str] = dataclasses.field(default_factory=dict)  # of values often given by mistake
    example: str = ""
    optional: bool = False

    def check(self, slot: str, value: Any) -> None:
        if value is None and self.optional:
            return
        if not isinstance(value, type) and all(hasattr(value, name) for name in self.attributes):
            return
        if isinstance(value, type) and all(hasattr(value, name) for name in self.attributes):
            way_out = f"that is the class. Give an object of it, as {value.__name__}(...)"
        else:
            given = value.lower() if isinstance(value, str) else getattr(value, "name", value)
            meant = self.examples.get(given) if isinstance(given, str) else None
            if slot == "format" and isinstance(value, str):
                meant = f"lb.formats.get({value!r})"
            if slot == "rotation" and isinstance(value, int):
                meant = f"lb.Hadamard(block={value})"
            way_out = f"give {self.what}, " + (f"here {meant}" if meant else f"such as {self.example}")
        none = ", or None" if self.optional else ""
        raise TypeError(f"Quantizer({slot}={value!r}): {way_out}{none}.")


def _named(place: str, *names: str) -> dict[str, str]:
    return {name: f"lb.{place}.{name}" for name in names}


SLOTS = {
    "format": Slot("a format", ("levels", "bits"), example="lb.formats.get('int4')"),
    "tiling": Slot(
        "a tiling", ("split", "describe"),
        {"tensor": "lb.scaling.PerTensor()", "row": "lb.scaling.PerRow()"}, "PerRow() or Group(32)",
    ),
    "fit": Slot(
        "a function",
        examples=_named("scaling", "absmax", "absmax_edge", "rms_optimal", "mean_abs"),
        example="lb.scaling.absmax",
    ),
    "rounding": Slot(
        "a function", examples=_named("rounding", "nearest", "stochastic", "toward_zero"), example="lb.rounding.nearest"
    ),
    "scale_format": Slot(
        "a scale format", ("store", "load", "describe"),
        {"e8m0": "lb.scaling.PowerOfTwo()", "float32": "lb.scaling.FLOAT32", "bfloat16": "lb.scaling.BFLOAT16",
         "float16": "lb.scaling.CastScale('float16')", "e4m3": "lb.scaling.TwoLevel()"},
        "lb.scaling.BFLOAT16 or lb.scaling.PowerOfTwo()",
    ),
    "rotation": Slot(
        "a rotation", ("apply", "undo", "describe"), {"hadamard": "lb.Hadamard()"}, "lb.Hadamard(block=128)", True
    ),
    "sparsity": Slot(
        "a support", ("mask", "group", "kept", "run"),
        {"2:4": "lb.sparsity.NofM(2, 4)", "4:8": "lb.sparsity.PairsNofM(2, 4)"}, "lb.sparsity.NofM(2, 4)", True,
    ),
    "debias": Slot("a correction", ("check", "corrected", "describe"), example="lb.scaling.Eden(128)", optional=True),
    "estimator": Slot(
        "an estimator", ("residuals", "gradients", "describe"), example="lb.estimators.StraightThrough()"
    ),
}  # fmt: skip
