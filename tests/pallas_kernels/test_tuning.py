"""The table of tuned tiles: whose tile is taken, and what a damaged table says."""

import json

import pytest

from pallas_kernels import chips, launch, tuning

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
     {"NVIDIA H200": {ENTRY: {"rows": "16"}}}, {"NVIDIA H200": {ENTRY: {"rows": 0}}}],
)  # fmt: skip
def test_a_damaged_table_is_named(user_table, table):
    user_table.write_text(table if isinstance(table, str) else json.dumps(table))
    with pytest.raises(ValueError, match=r"tuning\.json.*Delete"):
        tuning.lookup(ENTRY, "NVIDIA H200")
