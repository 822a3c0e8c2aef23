"""The table of tuned tiles: whose tile is taken, and what a damaged table says."""

import json
import pathlib
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import pytest

from pallas_kernels import chips, hadamard_backward, hadamard_quantize, launch, matmul_fp8, matmul_i8, matmul_mx, tuning

ENTRY = "matmul_a16/w4/m16/4096x4096"


TILE = dict(rows=16, columns=64, warps=4, stages=3, split=2)


@pytest.fixture(autouse=True)
def user_table(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_JAX_TUNING", str(tmp_path / "tuning.json"))
    return tmp_path / "tuning.json"


def test_a_tile_is_taken_on_its_own_chip_alone():
    tuning.store({ENTRY: TILE}, "NVIDIA H200")
    with chips.abstract_gpu("sm_90"):
        assert tuning.lookup(ENTRY) == TILE
        assert tuning.lookup("matmul_a16/w4/m32/4096x4096") is None
    with chips.abstract_gpu("sm_80"):
        assert tuning.lookup(ENTRY) is None
    assert tuning.lookup(ENTRY) is None  # no GPU, no tile
    with tuning.on_chip("NVIDIA H200"):
        assert tuning.lookup(ENTRY) == TILE


def test_the_users_table_goes_before_the_packages(tmp_path, monkeypatch):
    packaged = tmp_path / "tuned.json"
    monkeypatch.setattr(tuning, "PACKAGED", packaged)
    tuning.store({ENTRY: TILE | {"split": 8}, "only here": TILE}, "NVIDIA H200", packaged)
    assert tuning.lookup(ENTRY, "NVIDIA H200") == TILE | {"split": 8}
    tuning.store({ENTRY: TILE}, "NVIDIA H200")
    assert tuning.lookup(ENTRY, "NVIDIA H200") == TILE
    assert tuning.lookup("only here", "NVIDIA H200") == TILE


def test_an_h200_takes_an_h100s_tiles_where_it_has_none_of_its_own():
    other = TILE | {"split": 8}
    tuning.store({ENTRY: TILE, "another": TILE}, "NVIDIA H100 80GB HBM3")
    assert tuning.lookup(ENTRY, "NVIDIA H200") == tuning.lookup("another", "NVIDIA H200") == TILE
    tuning.store({ENTRY: other}, "NVIDIA H200")
    assert tuning.lookup(ENTRY, "NVIDIA H200") == other and tuning.lookup("another", "NVIDIA H200") == TILE
    tuning.store({"H200's": TILE}, "NVIDIA H200")
    assert tuning.lookup("H200's", "NVIDIA H100 80GB HBM3") is None


def test_the_tiles_of_the_package_are_tiles():
    for table in json.loads(tuning.PACKAGED.read_text()).values():
        for entry, tile in table.items():
            assert launch.Tile(**tile) and entry.count("/") == 3, entry


def test_storing_keeps_what_is_there():
    tuning.store({ENTRY: TILE}, "NVIDIA H200")
    tuning.store({"another": TILE}, "NVIDIA H200")
    tuning.store({ENTRY: TILE}, "NVIDIA A100-SXM4-80GB")
    assert tuning.lookup(ENTRY, "NVIDIA H200") == tuning.lookup("another", "NVIDIA H200") == TILE


@pytest.mark.parametrize(
    "table",
    ["{", "[]", {"NVIDIA H200": 5}, {"NVIDIA H200": {ENTRY: 5}}, {"NVIDIA H200": {ENTRY: {"rows": 16, "color": 3}}},
     {"NVIDIA H200": {ENTRY: {"rows": "16"}}}, {"NVIDIA H200": {ENTRY: {"rows": 0}}},
     {"NVIDIA H200": {ENTRY: {"rows": 17}}}, {"NVIDIA H200": {ENTRY: {"warps": 3}}},
     {"NVIDIA H200": {ENTRY: {"warps": True}}}, {"NVIDIA H200": {ENTRY: {"columns": 1 << 14}}}],
)  # fmt: skip
def test_a_damaged_table_is_named(user_table, table):
    user_table.write_text(table if isinstance(table, str) else json.dumps(table))
    with pytest.raises(ValueError, match=r"tuning\.json.*Delete"):
        tuning.lookup(ENTRY, "NVIDIA H200")


def test_tiles_of_older_tables_are_taken_in_one_part(user_table):
    user_table.write_text(json.dumps({"NVIDIA H200": {ENTRY: TILE | {"parts": 1}, "another": TILE | {"parts": 2}}}))
    assert tuning.lookup(ENTRY, "NVIDIA H200") == TILE
    assert tuning.lookup("another", "NVIDIA H200") is None


@pytest.mark.skipif(tuning.fcntl is None, reason="no locks here")
def test_writers_at_the_same_time_lose_nothing(user_table):
    keys = [f"kernel/w4/m16/{i}x32" for i in range(100)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: tuning.store({key: TILE}, "NVIDIA H200"), keys))
    assert set(json.loads(user_table.read_text())["NVIDIA H200"]) == set(keys)
    assert all(tuning.lookup(key, "NVIDIA H200") == TILE for key in keys)
    assert {path.name for path in user_table.parent.iterdir()} <= {"tuning.json", ".tuning.json.lock.tmp"}


def test_where_the_users_table_is(monkeypatch):
    def nowhere():
        raise RuntimeError("no home")

    monkeypatch.setattr(pathlib.Path, "home", lambda: pathlib.Path("/home/somebody"))
    monkeypatch.setenv("LOWBIT_JAX_TUNING", "")
    assert tuning.user_file() == pathlib.Path("/home/somebody/.cache/lowbit_jax/tuning.json")
    monkeypatch.setattr(pathlib.Path, "home", nowhere)
    monkeypatch.setenv("LOWBIT_JAX_TUNING", "/there.json")
    assert tuning.user_file() == pathlib.Path("/there.json")


def test_a_table_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file/tuning\.json.*LOWBIT_JAX_TUNING"):
        tuning.store({ENTRY: TILE}, "NVIDIA H200", tmp_path / "file" / "tuning.json")
    monkeypatch.setenv("LOWBIT_JAX_TUNING", str(tmp_path / "file" / "tuning.json"))
    pytest.importorskip("benchmarks.gpu.speed").store(ENTRY, launch.Tile(**TILE))
    assert "in the report alone" in capsys.readouterr().out


def test_tiles_that_do_not_fit_are_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "PACKAGED", tmp_path / "none.json")
    size, half, bad = (16, 512, 512), jnp.bfloat16, dict(rows=16, columns=32, split=64)
    keys = {
        tuning.key("matmul_i8", 8, *size): lambda: matmul_i8.default_tile(*size),
        tuning.key("matmul_fp8", 8, *size): lambda: matmul_fp8.default_tile(*size),
        tuning.key("matmul_mx", 4, *size): lambda: matmul_mx.default_tile(*size, "mxfp4"),
        hadamard_quantize.tuning_key(16, 512, 1, half, False): lambda: hadamard_quantize.default_tile(16, 512, 1, half),
        hadamard_backward.tuning_key(16, 512, 1, half): lambda: hadamard_backward.default_tile(16, 512, 1, half),
    }
    for key, default in keys.items():
        with tuning.on_chip("a chip"):
            own = default()
            tuning.store({key: bad}, "a chip")
            assert default() == own != launch.Tile(**bad), key
            tuning.store({key: bad | {"split": 1, "stages": 5}}, "a chip")
            assert default() == launch.Tile(rows=16, columns=32, stages=5), key


def test_two_to_sixteen_rows_share_a_tile():
    keys = {m: tuning.key("matmul_a16", 4, m, 4096, 4096) for m in (1, 2, 8, 16, 17, 33)}
    assert keys[2] == keys[8] == keys[16] == ENTRY and len(set(keys.values())) == 4
