"""Where the parameters, the optimizer's state and the batches of a run lie, and what travels between devices."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lowbit_jax as lb

Tree = Any
BATCH = ("data", "fsdp")  # axes of the mesh that cut a batch


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """mesh: data and fsdp cut the batch, fsdp and tensor the weights. gather: how fully sharded weights travel. reduce:
    bits of the gradients that travel, None for floats. compress: gradients over `data` with error feedback. offload:
    the optimizer's state waits in the host's memory."""

    mesh: Mesh
    rules: lb.parallel.Rules = lb.parallel.DECODER
    gather: Literal["float", "packed"] = "float"
    reduce: int | None = None
    compress: str | None = None
    offload: bool = False

    def __post_init__(self):
        if idle := [f"{name}={n}" for name, n in self.mesh.shape.items() if name not in lb.parallel.AXES]:
            raise ValueError(
                f"layout: --mesh {', '.join(idle)} cuts neither batch nor weights, however long. Give the axes data,"
                " fsdp and tensor."
            )
        if self.reduce is not None and self.compress is not None:
            raise ValueError(
                f"layout: --reduce int{self.reduce} and --compress {self.compress} both say how gradients travel. Take"
                " one."
            )
        if self.on_shards and self.mesh.shape["tensor"] > 1:
            raise ValueError(
                f"layout: packed weights and low-bit gradients travel over data and fsdp, and the mesh has"
                f" tensor={self.mesh.shape['tensor']}, whose sums XLA places itself. Use tensor=1, or leave --gather,"
                " --reduce and --compress out."
            )
        if self.gather == "packed" and self.mesh.shape["fsdp"] == 1:
            raise ValueError("layout: --gather packed takes effect over the axis fsdp, which is 1 long. Raise it.")
        for flag, value in (("--reduce", self.reduce), ("--compress", self.compress)):
            if value is not None and self.ways == 1:
                raise ValueError(f"layout: {flag} takes effect among devices that cut the batch, and there is one.")
        if self.compress is not None and self.mesh.shape["data"] == 1:
            raise ValueError("layout: --compress takes effect over the axis data, which is 1 long. Raise it.")
        if self.offload:
            kinds = [memory.kind for memory in self.mesh.devices.flat[0].addressable_memories()]
            if "pinned_host" not in kinds:
                raise ValueError(
                    f"layout: --offload-optimizer keeps the optimizer's state in pinned_host memory, and this backend"
                    f" has {', '.join(kinds)}. Leave the flag out; --optimizer-bits 8 takes a quarter of the memory."
                )

    def attach(self, model: Any) -> Any:
        """The model, told where its activations and weights lie while it computes; left to XLA alone, which would cut
        activations along features where weights are cut over fsdp, and move more than the weights."""
        if self.mesh.size > 1:
            model.placement = self
        return model

    @staticmethod
    def detach(model: Any) -> Any:
        """The model for one device again."""
        model.placement = None
        return model

    def whole_weights(self, name: str, module: nnx.Module, *, everywhere: bool = False) -> nnx.Module:
        """The module with weights whole along fsdp, where it uses them: XLA gathers them there. `everywhere`: along all
        axes."""
        if (self.mesh.shape["fsdp"] == 1 or self.on_shards) and not everywhere:
            return module
        graph, params, rest = nnx.split(module, nnx.Param, ...)
        placed = lb.parallel.shardings({name: params}, self.mesh, self.rules, unused="ignore")[name]
        spec = lambda s: PartitionSpec() if everywhere else _without(s.spec, "fsdp")
        specs = jax.tree.map(lambda s: NamedSharding(self.mesh, spec(s)), placed)
        return nnx.merge(graph, jax.lax.with_sharding_constraint(params, specs), rest)

    def cut_batch(self, x: jax.Array, *, everywhere: bool = False) -> jax.Array:
        """Activations with the batch cut, all else whole; as they are where the batch is too small to cut.
        `everywhere`: not cut either."""
        if everywhere:
            return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec()))
        if self.on_shards or self.ways == 1 or x.shape[0] % self.ways:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.batch_spec))

    @property
    def on_shards(self) -> bool:
        """Whether a step is written for each device, with collectives of our own, and not left to XLA."""
        return self.gather == "packed" or self.reduce is not None or self.compress is not None

    @property
    def ways(self) -> int:
        """Parts that a batch is cut into."""
        return math.prod(self.mesh.shape[name] for name in BATCH)

    @property
    def batch_spec(self) -> PartitionSpec:
        return PartitionSpec(BATCH)

    @property
    def reduction(self) -> lb.parallel.Reduction:
        return lb.parallel.Reduction(None if self.reduce is None else lb.parallel.wire_quantizer(self.reduce))

    def check_batch(self, batch: int, microbatches: int) -> None:
        """Raises: ValueError when the devices and microbatches do not divide the batch."""
        parts = self.ways * microbatches
        if batch % parts:
            raise ValueError(
                f"layout: a batch of {batch} sequences cannot be cut into {self.ways} parts"
                f" (data={self.mesh.shape['data']} x fsdp={self.mesh.shape['fsdp']}) of {microbatches} microbatches;"
                f" {batch % parts} are left over. Take a --batch that {parts} divides, such as"
                f" {-(-batch // parts) * parts}."
            )

    def shardings(self, params: Tree) -> Tree:
        """Of the parameters. Raises: ValueError when the mesh does not divide one of them."""
        return lb.parallel.shardings(params, self.mesh, self.rules)

    def along(self, placed: Tree, axis_name: str) -> Tree:
        """The specs with the cuts of one axis of the mesh alone."""
        keep = lambda cut: axis_name if cut == axis_name or isinstance(cut, tuple) and axis_name in cut else None
        return jax.tree.map(lambda s: PartitionSpec(*map(keep, s.spec)), placed)

    def state_shardings(self, state: dict[str, Tree], *, offload: bool | None = None) -> dict[str, Tree]:
        """Of a whole training state; counters are whole everywhere."""
        placed = self.shardings(state["params"])
        whole = NamedSharding(self.mesh, PartitionSpec())
        answer = {name: jax.tree.map(lambda _: whole, value) for name, value in state.items()}
        answer["params"] = placed
        moments = lb.optim.state_shardings(state["optimizer"], state["params"], placed)
        if self.offload if offload is None else offload:
            moments = jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), moments)
        answer["optimizer"] = moments
        if "errors" in state:
            specs = self.error_specs(state["errors"], state["params"])
            answer["errors"] = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)
        return jax.tree.map(_as_jit_answers, answer)

    def build(self, make: Callable[[], nnx.Module]) -> nnx.Module:
        """`make()` with every parameter made where it belongs, and never whole on one device."""
        graph, abstract = nnx.split(nnx.eval_shape(make))
        placed = lb.parallel.shardings(abstract, self.mesh, self.rules)
        return nnx.merge(graph, jax.jit(lambda: nnx.split(make())[1], out_shardings=placed)())

    def constrained(self, state: dict[str, Tree]) -> dict[str, Tree]:
        """Inside a jitted step: the state where it belongs, the optimizer's in the host's memory if it waits there."""
        here = jax.lax.with_sharding_constraint(state, self.state_shardings(state, offload=False))
        if self.offload:
            there = self.state_shardings(state)["optimizer"]
            here["optimizer"] = jax.tree.map(jax.device_put, here["optimizer"], there)
        return here

    def compressor(self):
        return lb.optim.compressed_mean("data", self.compress or "int8")

    def first_errors(self, params: Tree) -> Tree:
        """What the compression has yet to send, for each device of the axis data; nothing without compression."""
        if not self.compress:
            return ()
        n = self.mesh.shape["data"]
        zeros = jax.eval_shape(self.compressor().init, params)
        return jax.tree.map(lambda e: np.zeros((n, *e.shape[1:]), e.dtype), zeros)

    def error_specs(self, errors: Tree, params: Tree) -> Tree:
        if not self.compress:
            return jax.tree.map(lambda _: PartitionSpec(), errors)
        cuts = iter(jax.tree.leaves(self.along(self.shardings(params), "fsdp")))
        return jax.tree.map(lambda e: PartitionSpec("data", *next(cuts)), errors)

    def place(self, tree: Tree, shardings: Tree) -> Tree:
        """The tree on its devices; each process gives the parts that its own devices hold."""
        return jax.tree.map(_put, tree, shardings)

    def everywhere(self, tree: Tree) -> Tree:
        """The tree whole on every device."""
        return jax.tree.map(lambda leaf: _put(leaf, NamedSharding(self.mesh, PartitionSpec())), tree)

    def batch(self, tokens: np.ndarray) -> jax.Array:
        """A batch, cut over data and fsdp where they divide it, else whole everywhere. All processes have the same."""
        spec = self.batch_spec if tokens.shape[0] % self.ways == 0 else PartitionSpec()
        return _put(np.asarray(tokens), NamedSharding(self.mesh, spec))

    def cut_microbatches(self, tokens: jax.Array) -> jax.Array:
        """Keeps each microbatch on all devices: [microbatches, batch, time]."""
        return jax.lax.with_sharding_constraint(tokens, NamedSharding(self.mesh, PartitionSpec(None, BATCH)))


def fetch(tree: Tree) -> Tree:
    """Every array whole, as NumPy in this process's own memory and not on a device; all processes call it."""
    return jax.tree.map(whole, tree)


def whole(leaf: jax.Array) -> Any:
    """Random keys, which NumPy has no type for, come back as arrays of JAX."""
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(whole(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
    if getattr(leaf, "is_fully_addressable", True) or leaf.is_fully_replicated:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def _as_jit_answers(sharding: NamedSharding) -> NamedSharding:
    """The same sharding as compiled programs write it, without axes of length 1 and trailing Nones: a step then finds
    the state of the step before where its own first state was, and looks its program up once."""
    mesh, spec = sharding.mesh, []
    for cut in sharding.spec:
        names = [name for name in ((cut,) if isinstance(cut, str) else cut or ()) if mesh.shape[name] > 1]
        spec.append(tuple(names) if len(names) > 1 else names[0] if names else None)
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)


def _without(spec: PartitionSpec, axis_name: str) -> PartitionSpec:
    def rest(cut):
        names = tuple(n for n in ((cut,) if isinstance(cut, str) else cut or ()) if n != axis_name)
        return names or None

    return PartitionSpec(*map(rest, spec))


def _put(leaf, sharding: NamedSharding) -> jax.Array:
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(leaf), NamedSharding(sharding.mesh, PartitionSpec()))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    if isinstance(leaf, jax.Array) and leaf.is_fully_addressable == sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    array = np.asarray(leaf)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
