"""Bytes on the wire against programs whose bytes are known by hand, and the forms that HLO text takes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from lowbit_jax.parallel import bytes_on_the_wire, make_mesh

N = 4
SIZE = 4 * 64 * 32  # bytes of the local float32 array below


@pytest.mark.parametrize(
    ("function", "out", "kind", "sent"),
    [
        (lambda x: jax.lax.psum(x, "fsdp"), P(), "all-reduce", 2 * SIZE * 3 / 4),
        (lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), P("fsdp"), "reduce-scatter", SIZE * 3 / 4),
        (lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), P(), "all-gather", 4 * SIZE * 3 / 4),
        (lambda x: jax.lax.all_to_all(x, "fsdp", 0, 1, tiled=True), P("fsdp"), "all-to-all", SIZE * 3 / 4),
        (lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]), P("fsdp"), "collective-permute", SIZE),
    ],
)
def test_bytes_of_each_kind(function, out, kind, sent):
    mapped = jax.shard_map(function, mesh=make_mesh(fsdp=N), in_specs=P("fsdp"), out_specs=out, check_vma=False)
    wire = bytes_on_the_wire(jax.jit(mapped).lower(jnp.ones((N * 64, 32))).compile())
    assert wire.by_kind() == {kind: sent} and wire.sent == sent
    assert f"{sent:,.0f}" in str(wire)


def test_a_collective_in_a_loop_counts_once_a_turn():
    def loop(x):
        return jax.lax.scan(lambda c, _: (jax.lax.psum(c, "fsdp") * 0.5, None), x, length=7)[0]

    mapped = jax.shard_map(loop, mesh=make_mesh(fsdp=N), in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False)
    wire = bytes_on_the_wire(jax.jit(mapped).lower(jnp.ones((N * 64, 32))).compile())
    assert [c.times for c in wire.collectives] == [7] and wire.sent == 7 * 2 * SIZE * 3 / 4


def test_groups_on_one_axis_of_two():
    sum_over_data = lambda x: jax.lax.psum(x, "data")
    mapped = jax.shard_map(sum_over_data, mesh=make_mesh(data=2, fsdp=2), in_specs=P(("data", "fsdp")),
                           out_specs=P("fsdp"), check_vma=False)  # fmt: skip
    wire = bytes_on_the_wire(jax.jit(mapped).lower(jnp.ones((N * 64, 32))).compile())
    assert [c.devices for c in wire.collectives] == [2] and wire.sent == 2 * SIZE / 2


HEAD = "HloModule m, num_partitions=8\n\nENTRY %main (p: u8[4,16]) -> u8[32,16] {\n  %p = u8[4,16]{1,0} parameter(0)\n"


@pytest.mark.parametrize(
    ("line", "sent"),
    [  # as GPUs and TPUs write them: started and awaited, groups in each notation, small dtypes
        ("%s = (u8[4,16]{1,0}, u8[32,16]{1,0}) all-gather-start(%p), replica_groups=[1,8]<=[8], dimensions={0}",
         32 * 16 * 7 / 8),
        ("%s = u8[8,16]{1,0} all-gather(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}", 8 * 16 / 2),
        ("%s = u8[4,16]{1,0} all-reduce-start(%p), replica_groups={}, to_apply=%add", 2 * 64 * 7 / 8),
        ("%s = u8[4,16]{1,0} all-reduce(%p), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add", 2 * 64 * 3 / 4),
        ("%s = u8[4,16]{1,0} all-reduce(%p), replica_groups={{0},{1}}, to_apply=%add", 0),
    ],
)  # fmt: skip
def test_text(line, sent):
    assert bytes_on_the_wire(HEAD + f"  ROOT {line}\n}}\n").sent == sent


@pytest.mark.parametrize("kind", ["s4", "f8e4m3fn", "bf16", "pred", "f32"])
def test_dtypes(kind):
    bits = {"s4": 4, "f8e4m3fn": 8, "bf16": 16, "pred": 8, "f32": 32}[kind]
    text = (
        HEAD.replace("u8[", f"{kind}[") + f"  ROOT %s = {kind}[32,16]{{1,0}} all-gather(%p), replica_groups={{}}\n}}\n"
    )
    assert bytes_on_the_wire(text).sent == 32 * 16 * bits / 8 * 7 / 8


def test_what_is_not_compiled():
    with pytest.raises(TypeError, match="Pass jax.jit"):
        bytes_on_the_wire(jax.jit(lambda x: x).lower(1.0))
    with pytest.raises(TypeError, match="is not a compiled program"):
        bytes_on_the_wire(3)
