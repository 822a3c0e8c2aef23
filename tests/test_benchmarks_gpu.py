"""`benchmarks.gpu` where no GPU is: its checks interpreted, its programs lowered for one."""

import dataclasses
import functools
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import checks, course, model, profile, rotations, speed
from benchmarks.gpu.course import Course
from benchmarks.gpu.operands import KERNELS, Product, poisoned, relative_error
from pallas_kernels import both_ways, chips, tuning
from pallas_kernels.hadamard_quantize import Quantized
from pallas_kernels.launch import Tile


def test_the_cases_hold_every_width_dtype_and_kernel():
    with chips.abstract_gpu("sm_90"):
        found = list(checks.cases(512, interpreted=False))
    a16 = [p for p in found if p.kernel == "matmul_a16"]
    assert {p.bits for p in a16} == {p.bits for p in found if p.kernel == "matmul_a8"} == set(range(1, 9))
    assert {p.group for p in a16} == {None, 32, 64, 128} and {p.dtype for p in a16} == {"bfloat16", "float16"}
    assert {p.m for p in a16} >= {1, 16, 64, 200}
    assert {(p.bits, p.m) for p in a16 if p.zeros and p.group == 128} >= {(b, m) for b in (3, 4, 8) for m in (1, 16)}
    assert {p.kernel for p in found} >= set(KERNELS) - {"matmul_mx"}


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "matmul_mx"])
def test_a_product_holds_against_its_float64_reference(kernel):
    p = Product(kernel=kernel, bits=4 if kernel in ("matmul_a16", "matmul_a8") else 8, m=3, n=64, k=128)
    x, w = p.activation(1), p.weight(2)
    assert relative_error(poisoned(p.run("interpret"), x, w)(), p.reference(x, w)) <= checks.LIMIT["bfloat16"]
    other = p.weight(3)
    assert relative_error(p.run("xla")(x, other), p.reference(x, w)) > 0.1  # another weight is seen


@pytest.mark.parametrize("bits", [4, 8])
def test_microscaled_operands_hold_against_their_float64_reference(bits):
    p = Product(kernel="matmul_mx", bits=bits, m=3, n=64, k=128)
    x, w = p.activation(1), p.weight(2)
    assert relative_error(p.run("xla")(x, w), p.reference(x, w)) <= checks.LIMIT["bfloat16"]


def test_an_element_that_nobody_wrote_is_not_a_number():
    assert np.isnan(relative_error(jnp.asarray([1.0, jnp.nan]), np.ones(2)))
    y = poisoned(lambda x: (x + 1, x.astype(jnp.int32)), jnp.ones((4,)))()
    np.testing.assert_array_equal(y[0], 2.0)
    np.testing.assert_array_equal(y[1], 1)


def test_candidates_begin_with_the_default_and_are_distinct():
    for kernel, m in (("matmul_a16", 16), ("matmul_a8", 4096), ("matmul_i8", 4096), ("matmul_mx", 1)):
        p = Product(kernel=kernel, bits=4, m=m, n=4096, k=4096)
        tiles = speed.candidates(p)
        assert tiles[tiles[0] is None] == speed.default(p) and len(set(tiles)) == len(tiles) >= 4


KERNELS_OF_A_STEP = {
    "bfloat16": set(),
    "quest w4a4": {"hadamard_quantize4", "matmul_i8", "hadamard_backward"},
    "quest w8a8, int8 backward": {"hadamard_quantize8", "matmul_i8", "hadamard_backward"},
}


@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
@pytest.mark.parametrize("name", KERNELS_OF_A_STEP)
def test_the_training_steps_lower_for_a_gpu_with_their_kernels(name):
    kind = next(k for k in model.KINDS if k.name == name)
    with chips.abstract_gpu("sm_90"), jax.numpy_dtype_promotion("standard"):  # Flax promotes bfloat16 itself
        step, arguments = model.training_step(kind, "smoke", 2, 32)
        text = step.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    found = {k for k in {"hadamard_quantize4", "hadamard_quantize8", "matmul_i8", "hadamard_backward"} if k in text}
    assert found == KERNELS_OF_A_STEP[name]


def test_a_training_step_is_a_row_as_soon_as_it_is_timed(monkeypatch):
    """Time is up after the second of three: two rows, with kernels only where there is time for the profiler."""
    step = jax.jit(lambda state, rest, tokens: (state + 1, {"loss": state.sum()}))
    monkeypatch.setattr(model, "training_step", lambda *_: (step, (jnp.ones(4), None, None)))
    monkeypatch.setattr(model, "first", lambda *_: (jnp.ones(4), None, None))
    monkeypatch.setattr(model, "kernels_of", lambda *_: {"device_ms": 1.0})
    run = Course(rounds=2, part="training")
    rows = model.training("smoke", 2, 32, run, model.KINDS[:3])
    assert next(rows)["step"] == "bfloat16"
    second = next(rows)
    assert second["step"] == "quest w8a8" and second["ratio"] > 0 and "device_ms" not in second
    run.until = 0.0
    assert list(rows) == [] and run.report["left_out"] == ["quest w4a4"]
    found = list(model.training("smoke", 2, 32, Course(rounds=2), model.KINDS[:2]))
    assert [row["device_ms"] for row in found] == [1.0, 1.0]


@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
@pytest.mark.parametrize(("name", "kernels"), [("w4a16", {"matmul_w4a16"}),
                                               ("w2a2", {"hadamard_quantize2", "matmul_w2a8"})])  # fmt: skip
def test_the_forward_of_one_token_runs_kernels_on_a_gpu(name, kernels):
    """What is lowered for a GPU, where a reference would leave no kernel."""
    with chips.abstract_gpu("sm_90"), jax.numpy_dtype_promotion("standard"):
        run, state = model.unrolled(model.packed("smoke", model.ONE_TOKEN[name]))
        lowered = jax.jit(run).trace(state, jnp.zeros((1, 1), jnp.int32)).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert {kernel for kernel in ("matmul_w4a16", "matmul_w2a8", "hadamard_quantize2") if kernel in text} == kernels


@pytest.fixture
def promotion_in_threads():
    before = jax.config.jax_numpy_dtype_promotion
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", before)


@pytest.mark.usefixtures("promotion_in_threads")
def test_the_forward_of_one_token_is_rows_before_it_is_profiled(monkeypatch):
    monkeypatch.setattr(model, "kernels_of", lambda *_: {"device_ms": 1.0})
    run, rows = Course(rounds=1, part="one_token"), []
    for row in model.one_token("smoke", 1, run, {"w2a2": model.ONE_TOKEN["w2a2"]}):
        assert "device_ms" not in row
        rows.append(row)
        run.finished()
    assert [(row["model"], row["device_ms"]) for row in rows] == [("bfloat16", 1.0), ("w2a2", 1.0)]
    assert list(model.one_token("smoke", 1, run)) == [], "nothing is measured twice"


def test_a_machine_without_a_gpu_is_told_what_it_can_run(capfd):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    assert command.main(command.Config()) == 2 and "--smoke" in capfd.readouterr().out


def test_the_report_shows_what_failed_and_what_was_left_out():
    report = {"environment": {"device": "x"}, "seed": 1, "checks": [dict(kernel="w4a16", error=1e-3)],
              "errors": {"decode": "RuntimeError: no"}, "left_out": ["one_token"]}  # fmt: skip
    text = command.markdown(report)
    assert "| w4a16 | 0.001 |" in text and "decode failed: RuntimeError: no" in text and "one_token" in text


def test_a_check_that_fails_is_a_row_and_others_run():
    def broken():
        raise RuntimeError("no such instruction")

    saved = []
    told = [({"kernel": "a", "limit": 1.0}, lambda: lambda: 0.5), ({"kernel": "b", "limit": 1.0}, lambda: broken),
            ({"kernel": "c", "limit": 1.0}, lambda: lambda: float("nan"))]  # fmt: skip
    rows = [{"kernel": "a", "limit": 1.0, "error": 0.25}]  # of the process before
    checks.run(told, Course(rounds=1, save=lambda: saved.append([row["kernel"] for row in rows])), rows)
    assert [row["kernel"] for row in rows] == ["a", "b", "c"] and rows[0]["error"] == 0.25
    assert "no such instruction" in rows[1]["failed"] and rows[1]["error"] is None
    assert [row["kernel"] for row in checks.wrong(rows)] == ["b", "c"]
    assert saved[0] == ["a", "b"], "what runs is on disk before it runs"


def test_checks_after_one_that_stopped_the_device_are_left_to_the_next_process(monkeypatch):
    """An illegal access makes every later call of a process fail; the rows of before are known from a file."""
    dead = []

    def run(number):
        dead.extend([number] * (number == 1))
        if dead:
            raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
        return 0.0

    tile = dataclasses.asdict(Tile(rows=16, columns=64))
    told = [({"kernel": f"k{i}", "tile": tile, "limit": 1.0}, lambda i=i: lambda: run(i)) for i in range(4)]
    told[1][0]["sizes"] = (128, 256)  # a list in a file
    monkeypatch.setattr(checks, "answers", lambda: not dead)
    rows = []
    checks.run(told, Course(rounds=1), rows)
    assert [row["kernel"] for row in rows] == ["k0", "k1"] and "ILLEGAL" in rows[1]["failed"]
    dead.clear()
    rows = json.loads(json.dumps(rows))
    checks.run(told, Course(rounds=1), rows)
    assert [row["kernel"] for row in rows] == ["k0", "k1", "k2", "k3"] and checks.wrong(rows) == rows[1:2]


class Processes:
    """In place of processes on a GPU: each takes (what it runs, report), and gives how it ended."""

    def __init__(self, monkeypatch, folder, *each):
        self.runs, self.limits, self.each = [], [], iter(each)
        self.fresh = {"environment": {"device": "x"}, "seed": 1, "name": "x", "ended": [], "errors": {}}
        monkeypatch.setattr(command, "watched", self)
        self.folder = folder

    def __call__(self, arguments, path, until):
        self.runs.append([part for part in arguments[arguments.index("--parts") + 1 :] if part in command.PARTS])
        self.limits.append(until)
        report = json.loads(path.read_text()) if path.exists() else self.fresh | course.fresh()
        ended = next(self.each)(self.runs[-1], report)
        command.write(path, report)
        return ended

    @property
    def report(self):
        return json.loads((self.folder / "gpu_x.json").read_text())


def all_right(parts, report):
    report["ended"] += parts
    report["doing"] = None
    return 0


def ends(at, how, *before, what="a"):
    """A process that ends at `what` of a part, after the parts `before`."""

    def process(parts, report):
        report["ended"] += before
        report["doing"] = {"part": at, "what": what, "patience": 1.0}
        return how

    return process


@pytest.mark.parametrize("how", [-6, "told nothing for 90 s"])
@pytest.mark.parametrize("again", [False, True])
def test_a_part_that_ends_the_process_goes_on_behind_it_once_and_the_rest_run(monkeypatch, tmp_path, again, how):
    first, then = ends("large", how, "fused"), ends("large", how) if again else all_right
    made = Processes(monkeypatch, tmp_path, first, then, all_right)
    assert command.main(command.Config(parts=("fused", "large", "decode"), output=tmp_path)) == 1
    assert made.runs == [["fused", "large", "decode"], ["large", "decode"], ["decode"]][: 2 + again]
    assert set(made.report["ended"]) == {"fused", "large", "decode"}
    text = f"the process {'ended with status -6' if how == -6 else how} at a"
    more = f"; {text}, and what was left of it did not run" if again else ""
    assert made.report["errors"] == {"large": text + more}
    assert made.report["done"] == ["large: a"] * (1 + again), "the next process leaves it out"


def test_a_part_that_ends_too_many_processes_is_left(monkeypatch, tmp_path):
    bad = [ends("checks", -6, what=str(number)) for number in range(command.MOST_RESTARTS + 1)]
    made = Processes(monkeypatch, tmp_path, *bad, all_right)
    assert command.main(command.Config(parts=("checks", "decode"), output=tmp_path)) == 1
    assert made.runs == [["checks", "decode"]] * (command.MOST_RESTARTS + 1) + [["decode"]]


def test_a_check_that_ends_the_first_process_says_how(monkeypatch, tmp_path):
    def hangs(parts, report):
        report["checks"] = [{"kernel": "a", "limit": 1.0, "error": None, "failed": checks.RUNNING}]
        return ends("checks", "told nothing for 90 s")(parts, report)

    made = Processes(monkeypatch, tmp_path, hangs, all_right)
    assert command.main(command.Config(parts=("checks",), output=tmp_path)) == 1
    assert made.report["checks"][0]["failed"] == "the process told nothing for 90 s" and made.report["errors"]


def test_what_the_time_ends_is_told_and_no_other_process_begins(monkeypatch, tmp_path):
    made = Processes(monkeypatch, tmp_path, ends("decode", "did not end in time"))
    began = time.time()
    assert command.main(command.Config(parts=("decode", "one_token"), minutes=-0.1, output=tmp_path)) == 1
    assert made.limits[0] == pytest.approx(began - 6 + command.GRACE, abs=5) and command.GRACE < 20
    assert len(made.runs) == 1 and made.report["left_out"] == ["decode", "one_token"]
    assert made.report["errors"] == {"decode": "the process did not end in time at a"}


CHILD = """
import json, pathlib, sys, time
path = pathlib.Path(sys.argv[1])
for _ in range(int(sys.argv[2])):
    path.write_text(json.dumps({"doing": {"part": "a", "what": "b", "patience": 1.0}}))
    time.sleep(0.3)
time.sleep(60 * int(sys.argv[3]))
sys.exit(3)
"""


@pytest.mark.parametrize(("turns", "hangs", "within", "expected"), [
    (6, 0, 60, 3), (1, 1, 60, "told nothing for 1 s"), (6, 1, 1, "did not end in time"),
])  # fmt: skip
def test_a_process_that_tells_nothing_is_ended(monkeypatch, tmp_path, turns, hangs, within, expected):
    """Six turns take longer than the patience, and each of them is told."""
    monkeypatch.setattr(command, "POLL", 0.05)
    began, path = time.time(), tmp_path / "report.json"
    words = [sys.executable, "-S", "-c", CHILD, str(path), str(turns), str(hangs)]
    assert command.watched(words, path, began + within) == expected
    assert time.time() - began < 20


def test_a_course_leaves_out_what_is_done_and_what_is_late():
    run = Course(rounds=1, part="decode")
    assert run.wants("a") and run.wants("b")
    run.now("a")
    run.finished()
    assert not run.wants("a") and run.wants("b") and not run.report["left_out"]
    run.part, run.only = "training", ("training:int8",)
    assert run.wants("quest, int8 backward") and not run.wants("bfloat16") and not run.report["left_out"]
    run.part = "decode"
    run.until = 0.0
    assert not run.wants("a") and not run.wants("b") and not run.wants("b") and run.report["left_out"] == ["b"]


def test_the_kernels_are_checked_without_what_models_need():
    """Data, tokenizers and the library itself stay unimported, as they may not be there."""
    absent = "grain", "array_record", "portpicker", "flax", "optax", "orbax", "tokenizers", "lowbit_jax", "recipes"
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import benchmarks.gpu.__main__"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_kernel_times_are_those_of_the_gpus_streams():
    event = lambda name, ns: SimpleNamespace(name=name, duration_ns=ns)
    line = lambda name, *events: SimpleNamespace(name=name, events=list(events))
    gpu = SimpleNamespace(name="/device:GPU:0", lines=[
        line("Stream #14", event("a", 1000.0), event("b", 5000.0)), line("Stream #15", event("a", 500.0)),
        line("XLA Modules", event("module", 9000.0))])  # fmt: skip
    host = SimpleNamespace(name="/host:CPU", lines=[line("Stream of thoughts", event("a", 7.0))])
    assert profile.summed(SimpleNamespace(planes=[host, gpu])) == pytest.approx({"b": 5e-6, "a": 1.5e-6})


@pytest.mark.slow
def test_all_checks_hold_interpreted(tmp_path):
    assert command.main(command.Config(smoke=True, output=tmp_path)) == 0


def test_tiles_do_not_go_into_the_package_unchecked(monkeypatch, tmp_path, capsys):
    Processes(monkeypatch, tmp_path, all_right)
    monkeypatch.setattr(command.tuning, "store", lambda *_: pytest.fail("stored"))
    assert command.main(command.Config(parts=("decode",), package=True, output=tmp_path)) == 0
    assert "no tiles into the package" in capsys.readouterr().out
    assert command.main(command.Config(parts=("decoding",), output=tmp_path)) == 1
    assert "no part 'decoding'; it has checks" in capsys.readouterr().out
    for only in ("decode", "checks:w4", "training:int8"):  # no text, a part without names, one that does not run
        assert command.main(command.Config(parts=("checks", "decode"), only=(only,), output=tmp_path)) == 1
        assert "It takes PART:TEXT, of the parts that run: decode." in capsys.readouterr().out


def test_tiles_for_the_package_come_back_with_the_results(monkeypatch, tmp_path):
    """The table of the user's own, this chip's part of it, over what the package has."""
    monkeypatch.setenv("LOWBIT_JAX_TUNING", str(tmp_path / "tuning.json"))
    monkeypatch.setattr(tuning, "PACKAGED", tmp_path / "tuned.json")
    old, new = (dataclasses.asdict(Tile(columns=columns)) for columns in (16, 32))
    tuning.store({"a/w4/m1/1x1": old, "b/w4/m1/1x1": old}, "x", tuning.PACKAGED)
    tuning.store({"b/w4/m1/1x1": new}, "x")

    def checked(parts, report):
        report["checks"] = [{"kernel": "a", "limit": 1.0, "error": 0.5}]
        return all_right(parts, report)

    Processes(monkeypatch, tmp_path, checked)
    assert command.main(command.Config(parts=("checks",), package=True, output=tmp_path)) == 0
    for path in (tuning.PACKAGED, tmp_path / "tuned_x.json"):
        assert json.loads(path.read_text()) == {"x": {"a/w4/m1/1x1": old, "b/w4/m1/1x1": new}}


def test_products_that_time_did_not_allow_are_named_and_not_compiled(monkeypatch):
    monkeypatch.setattr(speed, "build", lambda *_: pytest.fail("compiled"))
    run, roof = Course(rounds=1, until=0.0), speed.Roof(bandwidth=1.0, bfloat16=1.0)
    assert list(speed.compare([(3, 64, 128)], [("matmul_a16", 4, 128)], roof, run)) == []
    assert run.report["left_out"] == ["w4a16 for 3 rows of 64x128"]


@pytest.mark.parametrize("broken", [False, True])
def test_a_tile_with_a_wrong_result_is_not_timed(broken, monkeypatch, tmp_path):
    monkeypatch.setenv("LOWBIT_JAX_TUNING", str(tmp_path / "tuning.json"))
    monkeypatch.setattr(speed, "copies", lambda m: 2)
    monkeypatch.setattr(speed, "sets", lambda p: 2)
    p = Product(kernel="matmul_a16", bits=4, m=3, n=64, k=128, group=32)
    tiles = Tile(rows=16, columns=32), Tile(rows=8, columns=64)
    right = speed.over_weights(p.run("xla"), "right")
    wrong = lambda xs, weights: (right(xs, weights)[0].at[0, 0].set(jnp.nan), ())
    built = speed.Built(p, [(tiles[0], wrong if broken else right), (tiles[1], right)], right)
    row = speed.measured(built, lambda: jnp.ones(()), None, 2, speed.Roof(bandwidth=1e12, bfloat16=1e12))
    assert len(row["tried_us"]) == 2 - broken and (len(row["wrong_tiles"]) == 1) == broken
    found = tuning.lookup(tuning.key("matmul_a16", 4, 3, 64, 128), jax.devices()[0].device_kind)
    assert found == row["tile"] and (row["tile"] == dataclasses.asdict(tiles[1]) or not broken)
    both = speed.Built(p, [(tiles[0], wrong)], right)
    none = speed.measured(both, lambda: jnp.ones(()), None, 2, speed.Roof(bandwidth=1e12, bfloat16=1e12))
    assert "ratio" not in none and "no tile is right" in speed.line(none)
    entry = tuning.key("matmul_a16", 4, 3, 64, 128)
    assert tuning.lookup(entry, jax.devices()[0].device_kind) is None, "a tile of an earlier run is not kept"


def test_a_product_of_which_no_tile_compiles_leaves_the_table(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWBIT_JAX_TUNING", str(tmp_path / "tuning.json"))
    monkeypatch.setattr(speed, "build", lambda products, *_: [speed.Built(p, [], jnp.dot) for p in products])
    entry, chip = tuning.key("matmul_a16", 4, 3, 64, 128), jax.devices()[0].device_kind
    tuning.store({entry: dataclasses.asdict(Tile())}, chip)
    roof = speed.Roof(bandwidth=1.0, bfloat16=1.0)
    assert list(speed.compare([(3, 64, 128)], [("matmul_a16", 4, 128)], roof, Course(rounds=1))) == []
    assert tuning.lookup(entry, chip) is None


def test_weights_fill_more_than_the_cache_and_not_the_memory():
    """Two bits of 2048x2048 are a megabyte: 16 of them fit the 50 MB of an H100's second-level cache."""
    bytes_of = lambda p: speed.sets(p) * speed.copies(p.m) * p.n * p.k * p.bits // 8
    for chip in ("sm_80", "sm_90", "sm_100"):
        with chips.abstract_gpu(chip):
            for n, k in command.LAYERS:
                p = Product(kernel="matmul_a8", bits=2, m=1, n=n, k=k)
                assert 4 * chips.CHIPS[chip].l2 <= bytes_of(p) <= 1 << 30
            assert speed.sets(Product(kernel="matmul_a16", bits=4, m=1, n=14336, k=4096)) <= 2
            small = Product(kernel="matmul_a16", bits=4, m=1, n=64, k=128)
            assert speed.sets(small) == speed.MOST_SETS
    small = dataclasses.replace(small, bits=1)
    weights, seen = speed.weights_of(small), []
    run = speed.in_turn(lambda x, w: seen.append(id(w)), (), weights)
    for _ in range(2 * len(weights)):
        run()
    assert len(weights) == speed.MOST_SETS and seen[: len(weights)] == seen[len(weights) :] == [*map(id, weights)]


def test_a_rotation_is_traced_once_a_tile(monkeypatch):
    monkeypatch.setattr(rotations, "NO_SPILLS", {})
    traced = []

    def run(x, tile):
        traced.append(tile)
        return x + 1

    tile = Tile(rows=16)
    case = rotations.Case("a", "a", run, (tile,), [(i * jnp.ones((4, 4)),) for i in range(6)])
    first, each = case.compiled(tile)(case.arguments)
    assert traced == [tile] and first.shape == (4, 4) and list(each) == [1, 2, 3, 4, 5, 6]


def test_every_product_of_a_program_is_computed(monkeypatch):
    """Of each there is one number in the answer, and the compiler has nothing to leave out for it."""
    p = Product(kernel="matmul_a16", bits=4, m=3, n=64, k=128, group=32)
    xs, weights = speed.activations(p), speed.weights_of(p)[0]
    program = speed.over_weights(p.run("xla"), "products")
    first, each = program(xs, weights)
    expected = [float(p.run("xla")(x, w)[0, 0]) for x in xs for w in weights]
    np.testing.assert_allclose(each, expected, rtol=2**-7)
    assert first.shape == (3, 64)
    dot = speed.over_weights(jnp.dot, "dots")
    compiled = dot.lower([jnp.ones((3, 128))] * 2, [jnp.ones((128, 64))] * 2).compile()
    assert compiled.cost_analysis()["flops"] >= 4 * 2 * 3 * 128 * 64


APART = """
from pallas_kernels import deviceless
if deviceless.missing():
    raise SystemExit("absent")
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from benchmarks.gpu import speed
on = SingleDeviceSharding(deviceless._topology("sm_90").devices[0])
shape = lambda *size: jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=on)
traced = speed.over_weights(jnp.dot, "dots").trace([shape(16, 1024)] * 4, [shape(1024, 2048)] * 3)
text = traced.lower(lowering_platforms=("cuda",)).compile().as_text()
print([size for size in ("16,2048]", "[16,6144]", "[64,2048]", "[64,1024]", "[1024,6144]") if size in text])
"""


def test_products_stay_apart_on_a_gpu():
    """Several activations are not made one matrix, nor several weights, of which each is read once then."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", APART], capture_output=True, text=True, timeout=300)
    if "absent" in done.stderr:
        pytest.skip("the CUDA plugin is not installed: see pallas_kernels/README.md")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['16,2048]']", "results of one product, and no matrix of several side by side"


def test_a_moved_code_is_told_from_wrong_sums():
    """A code a row in 2000 moves, and with it each sum: the tile is right; a sum that is not its codes' is wrong."""
    codes = np.random.default_rng(0).integers(-8, 8, (8, 2048)).astype(np.int8)
    moved = codes.copy()
    moved[:, 5] ^= 1
    made = lambda codes, off=0: Quantized(
        jnp.asarray(codes), jnp.ones(8), jnp.asarray(codes.sum(1, dtype=np.int32) + off)
    )
    assert 0 < rotations.difference(made(moved), made(codes)) <= rotations.DIFFER
    assert rotations.difference(made(codes, off=1), made(codes)) > rotations.DIFFER
    assert rotations.difference(made(codes), made(codes)) == 0


def test_a_rotation_with_wrong_tiles_alone_leaves_the_table(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWBIT_JAX_TUNING", str(tmp_path / "tuning.json"))
    monkeypatch.setattr(rotations, "NO_SPILLS", {})
    monkeypatch.setattr(rotations, "ARRAYS", 1)
    run = lambda x, tile: x + 1
    tiles = Tile(rows=16), Tile(rows=32)
    case = rotations.Case("a", "a", run, tiles, [(jnp.ones((4, 4)),)], lambda x: x + 2)
    monkeypatch.setattr(rotations, "cases", lambda: [case])
    chip = jax.devices()[0].device_kind
    tuning.store({"a": dataclasses.asdict(Tile())}, chip)
    [row] = rotations.measure(speed.Roof(bandwidth=1e12, bfloat16=1e12), Course(rounds=1))
    assert len(row["wrong_tiles"]) == 2 and tuning.lookup("a", chip) is None


@pytest.mark.parametrize("xla_is_faster", [True, False])
def test_a_tile_stays_in_the_table_only_where_it_beats_xla(xla_is_faster, monkeypatch, tmp_path):
    """Interpreted programs under told times: the first tile takes 2, the second 1, XLA half of that or twice."""
    monkeypatch.setenv("LOWBIT_JAX_TUNING", str(tmp_path / "tuning.json"))
    m, n, tiles = 16, 32, (Tile(rows=16, columns=16, stages=1), Tile(rows=16, columns=32, stages=1))
    key, chip = both_ways.tuning_key(m, n, jnp.bfloat16), jax.devices()[0].device_kind
    run, by_xla = (functools.partial(both_ways.quantize_both_ways, impl=impl) for impl in ("interpret", "xla"))
    operands = [(jnp.ones((m, n), jnp.bfloat16), jnp.ones(n), jnp.ones(m))]
    took = {str(tiles[0]): [2.0], str(tiles[1]): [1.0], "xla": [0.5 if xla_is_faster else 2.0], "copy": [1.0]}
    monkeypatch.setattr(rotations, "ARRAYS", 1)
    monkeypatch.setattr(rotations, "NO_SPILLS", {})  # an option of the GPU's compiler
    monkeypatch.setattr(rotations, "cases", lambda: [rotations.Case("both", key, run, tiles, operands, by_xla)])
    monkeypatch.setattr(rotations, "seconds", lambda programs, rounds: {name: took[name] for name in programs})
    tuning.store({key: dataclasses.asdict(Tile(rows=64, columns=64, stages=1))}, chip)
    late, roof = Course(rounds=2, until=0.0), speed.Roof(bandwidth=1e12, bfloat16=1e12)
    assert list(rotations.measure(roof, late)) == [] and late.report["left_out"] == ["both"]
    [row] = rotations.measure(roof, Course(rounds=2))
    assert row["wrong_tiles"] == []
    assert set(row["tried_us"]) == set(map(str, tiles)) and row["default_us"] == 2 * row["us"]
    stored = tuning.lookup(key, chip)
    assert stored is None if xla_is_faster else stored == dataclasses.asdict(tiles[1])
