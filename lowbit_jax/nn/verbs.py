"""The verbs on whole modules, for both of Flax's APIs; Flax itself is imported when the first one is called."""

import sys
from collections.abc import Iterable
from typing import Any, Literal

from lowbit_jax.nn.policy import Rules, make_policy
from lowbit_jax.ops import LinearRecipe

CODES = "lowbit_codes"
"""Name, for `jax.checkpoint_policies.save_only_these_names`, of what `keep_codes` keeps."""


def framework(module: Any, who: str) -> Literal["nnx", "linen"]:
    """Which API the module belongs to. Raises: TypeError, with the way out, for what is no module."""
    names: tuple[Literal["nnx", "linen"], ...] = ("nnx", "linen")
    for name in names:
        library = sys.modules.get(f"flax.{name}")
        base = getattr(library, "Module", None)
        if base is None:
            continue
        if isinstance(module, base):
            return name
        if isinstance(module, type) and issubclass(module, base):
            raise TypeError(f"{who} got the class {module.__name__}. Build the module first and pass the instance.")
    if hasattr(module, "dtype") and hasattr(module, "shape"):
        way = "For an array call a quantizer, such as lb.quest_quantizer(4)(x)."
    elif isinstance(module, dict) or type(module).__name__ in ("State", "FrozenDict", "GraphDef"):
        way = "Parameters alone do not say how they are used: pass the module that they belong to."
    elif callable(module):
        way = "Functions hold no layers: call lb.dot_general with a recipe inside, or pass a Flax module."
    else:
        way = "Pass an instance of flax.nnx.Module or flax.linen.Module."
    raise TypeError(f"{who} got an object of type {type(module).__name__}, which is no Flax module. {way}")


def quantize(module: Any, recipe: LinearRecipe | None = None, *, rules: Rules | None = None, rngs: Any = None) -> Any:
    """The quantized form of a Flax layer or model: same class, call, parameters and paths; the original stays as it is.

    `recipe` goes to every layer that no rule names; by default it is `lb.quest(4)`, or high precision when some rule
    brings a recipe. `rules` is an ordered list of `(pattern, recipe or None)`: see `lowbit_jax.nn.policy`. Quantized
    are the products of NNX's Linear, LinearGeneral, Einsum, Conv and of Linen's Dense, DenseGeneral, Einsum, Conv, with
    their subclasses and whatever is made of them (attention, whole models, stacks for a scan), however they are called.

    NNX: a view that shares the original's Variables, so training it trains them (`nnx.clone` the original first for a
    twin). Learned scales (LSQ, PACT) are `nnx.Param`s in the layer, at `<layer>/<dot_general, ...>/lhs_scale` and
    `rhs_scale`; `rngs` gives each layer of a stochastic recipe a stream of keys.
    Linen: learned scales are in `params`, under the layer; keys come from the stream "quantize" of `init` and `apply`.
    Rules are checked when the model is traced.
    Raises: TypeError for what is no module or no recipe; ValueError for rules that match nothing or name what cannot be
    quantized, for layers quantized already, sizes that a group does not divide, and models with nothing to quantize."""
    who = "lb.quantize"
    kind = framework(module, who)
    policy = make_policy(recipe, rules, who)
    if kind == "nnx":
        from lowbit_jax.nn import nnx

        return nnx.quantize(module, policy, rngs, who)
    from lowbit_jax.nn import linen

    if rngs is not None:
        raise TypeError(
            "lb.quantize(rngs=...): Linen modules take keys in the call: model.apply(..., rngs={'quantize': key})."
        )
    return linen.quantize(module, policy, who)


def convert(model: Any, *args: Any, layout: str | None = None, implementation: str = "auto", **kwargs: Any) -> Any:
    """Training form to packed form: weights stored as packed codes (`QTensor`), same call, same outputs up to rounding.

    NNX: `lb.convert(model)` is a view whose kernels are `PackedWeight`s; everything else is shared. Linen:
    `lb.convert(model, variables, *args)` answers `(model, variables)`; `args` are inputs of one call (shapes are
    enough), which tell how the weights are used. Layers stacked for a scan stay stacked. A stochastic rounding becomes
    nearest. Packed and training form compute with the same values; sums may be ordered differently, and a weight
    rotated alone rotates its activation here instead: outputs agree to about `K * eps` of the dtype that the
    weight is kept or computed in, the coarser.

    `layout` is "bitstream-le/1", the smallest, or "planes/1", which the GPU kernels read (the default where JAX runs on
    a GPU). With "planes/1", `implementation` says what multiplies: "auto" (the kernel on a CUDA GPU, else XLA),
    "kernel" (it or an error), "reference" (XLA) or "interpret" (the kernel, slowly, anywhere). A recipe whose own
    implementation is "reference" keeps it under "auto", in either layout.
    Raises: ValueError when nothing is quantized or it is packed already, and for options that cannot take effect;
    NotImplementedError for a kernel that is asked for and does not exist; TypeError for what is no module."""
    from lowbit_jax.nn.weight import Storage, default_layout

    storage = Storage(default_layout() if layout is None else layout, implementation)
    if framework(model, "lb.convert") == "nnx":
        from lowbit_jax.nn import nnx_convert

        if args or kwargs:
            raise TypeError("lb.convert: an nnx model holds its parameters; call lb.convert(model) alone.")
        return nnx_convert.convert(model, storage)
    from lowbit_jax.nn import linen_convert

    return linen_convert.convert(model, storage, *args, **kwargs)


def prepare(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model with every weight rotated and quantized once; differentiable, for many microbatches in one step.

    Call it inside the differentiated function, and run all microbatches through its result:

        def loss(model, microbatches):
            ready = lb.nn.prepare(model)
            return jnp.mean(jax.lax.map(lambda batch: batch_loss(ready, batch), microbatches))

    A gradient by the prepared model itself belongs to its rotated weights; it has another tree than the model's
    parameters, so that no optimizer of theirs takes it. A weight whose original a backward product reads stays as it
    is.
    NNX: `prepare(model)`. Linen: `prepare(model, variables, *args)` answers `(model, variables)`.
    Raises: ValueError when nothing is quantized."""
    if framework(model, "lb.nn.prepare") == "nnx":
        from lowbit_jax.nn import nnx_convert

        if args or kwargs:
            raise TypeError("lb.nn.prepare: an nnx model holds its parameters; call lb.nn.prepare(model) alone.")
        return nnx_convert.prepare(model)
    from lowbit_jax.nn import linen_convert

    return linen_convert.prepare(model, *args, **kwargs)


def gptq(
    model: Any,
    batches: Iterable[Any],
    *,
    damping: float = 0.01,
    layout: str | None = None,
    implementation: str = "auto",
) -> Any:
    """`lb.convert` with the levels of each weight chosen for small errors of its layer's outputs (GPTQ), from the
    inputs that the layer meets when the quantized model runs `batches`.

        packed = lb.nn.gptq(lb.quantize(model, lb.quest(3, activations=False)), [tokens_1, tokens_2])

    For models that were trained in full precision; one that was trained with its quantizer has moved its weights
    itself. batches: each an array, a tuple of the arguments of one call, or a dict of its arguments by name; what is no
    array in them stays as it is. damping: a share of the mean of a layer's x^T x, added to its diagonal. Scales are
    those of `lb.convert`, and so is all that is no product of one weight with one input: convolutions, embeddings,
    batched products. Layers that share a weight are packed for the inputs of all.
    Source: Frantar et al. 2022, arXiv:2210.17323; see `lowbit_jax.gptq`.
    Raises: TypeError for what is no NNX module; ValueError without batches, when they do not run a layer or a
    transformation inside of the model loses some of its inputs, for inputs that are not finite, for sparse weights,
    inside of `jit`, and as `lb.convert`."""
    if framework(model, "lb.nn.gptq") != "nnx":
        raise TypeError("lb.nn.gptq takes an nnx module. In Linen pack weights by lowbit_jax.gptq.gptq.")
    from lowbit_jax.nn import nnx_gptq
    from lowbit_jax.nn.weight import Storage, default_layout

    storage = Storage(default_layout() if layout is None else layout, implementation)
    return nnx_gptq.gptq(model, batches, storage, damping)


def keep_codes(model: Any) -> Any:
    """A view of an NNX model for rematerialization: each quantized operand can be kept as packed codes, scales and what
    its estimator needs, instead of being rotated, fitted and rounded again in the backward pass.

        policy = jax.checkpoint_policies.save_only_these_names(lb.nn.CODES)
        layer = nnx.remat(lambda x, block: lb.nn.keep_codes(block)(x), policy=policy)

    Values and gradients stay the same. It computes through XLA; weights that are packed and layers that are not
    quantized stay as they are. Raises: TypeError for what is no NNX module."""
    if framework(model, "lb.nn.keep_codes") != "nnx":
        raise TypeError("lb.nn.keep_codes takes an nnx module; under Linen rematerialize the whole layer.")
    from lowbit_jax.nn import kept_codes

    return kept_codes.keep_codes(model)


def calibrate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Learned activation scales (LSQ, PACT) fitted to one batch of inputs, layer after layer, each on quantized inputs.

    Before, they fit a unit Gaussian. Inputs that are all zeros fit no scale, and leave it as it is. Weight scales stay,
    except those of layers under a WeightNorm or SpectralNorm: they are fitted to the weight that the norm makes.
    A layer that the call runs several times, by name or in a loop, gets the mean of what each run fits.
    NNX: `calibrate(model, *args)` sets them in place and returns the model; statistics, keys and weights stay. A loop
    has to carry the scales of a layer that its turns share. Linen: `calibrate(model, variables, *args)` returns new
    variables, with the scales that those of the float model lack; where a loop shares a layer, not inside `jit`.
    Raises: ValueError when no activation scale is learned, when the call does not set one, or a transformation inside
    of an NNX model loses one of its runs, and for an NNX model inside of `jit`."""
    if framework(model, "lb.calibrate") == "nnx":
        from lowbit_jax.nn import nnx_calibrate

        return nnx_calibrate.calibrate(model, *args, **kwargs)
    from lowbit_jax.nn import linen_calibrate

    return linen_calibrate.calibrate(model, *args, **kwargs)


def calibrate_over(model: Any, *args: Any, statistic: Literal["mean", "max"] = "mean") -> Any:
    """`lb.calibrate` over several batches: static activation scales, as post-training quantization has them.

        model = lb.nn.calibrate_over(lb.quantize(model, lb.methods.get("static_integer")), batches)

    Each scale becomes the mean of what the batches fit, or the largest ("max"; by absmax that of all of them, but for a
    layer that a call runs several times, where a batch fits the mean). One in which the input of a layer is all zeros
    fits no scale there, and does not count. batches: as of `lb.nn.gptq`.
    NNX: `calibrate_over(model, batches)` sets the scales in place and returns the model; where a batch raises, nothing
    is set. Linen: `calibrate_over(model, variables, batches)` returns new variables; each batch is compiled anew.
    Raises: TypeError for what is no module, or other arguments; ValueError without batches, for another statistic, and
    as `lb.calibrate`."""
    import jax.numpy as jnp

    who, kind = "lb.nn.calibrate_over", framework(model, "lb.nn.calibrate_over")
    wanted = ("batches",) if kind == "nnx" else ("variables", "batches")
    if len(args) != len(wanted):
        raise TypeError(f"{who} of this module takes (model, {', '.join(wanted)}), and got {len(args) + 1} arguments.")
    known = {"mean": jnp.nanmean, "max": jnp.nanmax}
    if statistic not in known:
        raise ValueError(f"{who}(statistic={statistic!r}): it is 'mean' or 'max'.")
    if kind == "nnx":
        from lowbit_jax.nn import nnx_calibrate

        return nnx_calibrate.calibrate_over(model, args[0], known[statistic])
    from lowbit_jax.nn import linen_calibrate

    return linen_calibrate.calibrate_over(model, args[0], args[1], known[statistic])


def recipes(model: Any) -> dict[str, LinearRecipe]:
    """The recipe of each quantized layer of an NNX model, by its path (each of its paths, where layers are shared).

    Raises: TypeError for what is no NNX module."""
    if framework(model, "lb.nn.recipes") != "nnx":
        raise TypeError("lb.nn.recipes takes an nnx module; the layers of Linen are known in a call: see lb.explain.")
    from lowbit_jax.nn import nnx_explain

    return nnx_explain.recipes(model)


def explain(model: Any, *args: Any, **kwargs: Any) -> Any:
    """What a recipe or a quantized model computes: a table of layer, product, operand, format, tiling, fit, rounding,
    rotation (the block each layer really gets), estimator and bits; `str()` prints it, `.rows` holds it.

    With the inputs of a call, the call and its gradient are compiled, not run, and the column "ran" shows the operation
    and dtypes of each product in the compiled programs; `.missing` names quantized layers that are not there, `.others`
    the products of the forward program that are no layer's of the table. Linen models show their layers only so:
    `lb.explain(model, *args)`, or `lb.explain(model, variables, *args)`.
    Raises: TypeError for what is neither a recipe nor a module."""
    from lowbit_jax.nn import report

    if isinstance(model, LinearRecipe):
        if args or kwargs:
            raise TypeError("lb.explain(recipe) takes no inputs; a quantized model takes them.")
        return report.explain_recipe(model)
    if framework(model, "lb.explain") == "nnx":
        from lowbit_jax.nn import nnx_explain

        return nnx_explain.explain(model, *args, **kwargs)
    from lowbit_jax.nn import linen_explain

    return linen_explain.explain(model, *args, **kwargs)
