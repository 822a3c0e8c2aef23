"""A checkpoint comes back whole or not at all."""

import json
import re
import shutil
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from recipes import checkpoints
from recipes.checkpoints import Checkpoints


def tree(value: float):
    return {
        "params": {"kernel": jnp.full((3, 5), value), "packed": jnp.arange(7, dtype=jnp.uint8)},
        "moments": [jnp.asarray(value, jnp.bfloat16), jnp.full((2,), -value)],
        "count": jnp.int32(7),
    }


@pytest.fixture
def saved(tmp_path):
    store = Checkpoints(tmp_path / "c", keep=2)
    store.save(10, tree(1.5), data={"next_index": 10})
    store.save(20, tree(2.5), data={"next_index": 20})
    return store


def assert_is(found, step: int, value: float):
    assert found[0] == step and found[2] == {"data": {"next_index": step}}
    jax.tree.map(np.testing.assert_array_equal, found[1], tree(value))
    assert jax.tree.map(lambda x: x.dtype, found[1]) == jax.tree.map(lambda x: x.dtype, tree(value))


def test_newest_comes_back(saved):
    assert_is(saved.latest(tree(0.0)), 20, 2.5)


def test_none_yet(tmp_path):
    assert Checkpoints(tmp_path / "c").latest(tree(0.0)) is None


def test_keeps_the_newest_two(saved):
    saved.save(30, tree(3.5), data={"next_index": 30})
    assert saved.steps() == [20, 30]


def test_a_copy_beside_them_is_no_checkpoint(saved):
    for name in ("step_00000020.bak", "step_20", "step_000000020", "step_", "step_+0000020", "step_0000002０"):
        shutil.copytree(saved.folder / "step_00000020", saved.folder / name)
    (saved.folder / "step_00000040").touch()
    assert saved.steps() == [10, 20]
    assert_is(saved.latest(tree(0.0)), 20, 2.5)
    saved.save(30, tree(3.5))
    assert saved.steps() == [20, 30] and (saved.folder / "step_00000020.bak").is_dir()


def files(folder):
    return sorted((file for file in folder.rglob("*") if file.is_file()), key=lambda file: -file.stat().st_size)


def test_a_flipped_bit_anywhere_never_comes_back(saved):
    """One bit in the middle of each file in turn: this checkpoint comes back intact, or the one before, warned."""
    newest = saved.folder / "step_00000020"
    keep = saved.folder.parent / "keep"
    shutil.copytree(newest, keep)
    fell_back = 0
    for file in files(newest):
        raw = bytearray(file.read_bytes())
        if not raw:
            continue
        raw[len(raw) // 2] ^= 0x10
        file.write_bytes(raw)
        try:
            assert_is(saved.latest(tree(0.0)), 20, 2.5)
        except UserWarning as warning:  # pytest makes it an error
            assert "is damaged" in str(warning)
            fell_back += 1
        shutil.rmtree(newest)
        shutil.copytree(keep, newest)
    assert fell_back >= 2  # the manifest and the arrays' file at least


def test_wrong_values_under_a_valid_file_are_noticed(saved):
    """What Orbax itself cannot see: another array's bytes in a well-formed file."""
    newest = saved.folder / "step_00000020"
    shutil.rmtree(newest / "arrays")
    shutil.copytree(saved.folder / "step_00000010" / "arrays", newest / "arrays")
    with pytest.warns(UserWarning, match="step_00000020 is damaged .*does not have its checksum"):
        assert_is(saved.latest(tree(0.0)), 10, 1.5)


@pytest.mark.parametrize("damage", ["truncate", "remove arrays", "remove manifest", "change manifest", "no version"])
def test_other_damage_falls_back(saved, damage):
    newest = saved.folder / "step_00000020"
    if damage == "truncate":
        for file in files(newest / "arrays")[:2]:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "remove arrays":
        shutil.rmtree(newest / "arrays")
    elif damage == "remove manifest":
        (newest / "manifest.json").unlink()
    elif damage == "no version":  # under a checksum of its own, as another program might write it
        manifest = json.loads((newest / "manifest.json").read_text())
        del manifest["version"], manifest["sha256"]
        manifest["sha256"] = checkpoints._digest_of_json(manifest)
        (newest / "manifest.json").write_text(json.dumps(manifest))
    else:
        manifest = json.loads((newest / "manifest.json").read_text())
        manifest["extra"]["data"]["next_index"] = 3
        (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match="is damaged"):
        assert_is(saved.latest(tree(0.0)), 10, 1.5)


def test_all_damaged_is_an_error_not_a_fresh_start(saved):
    for manifest in saved.folder.rglob("manifest.json"):
        manifest.write_text("{")
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(ValueError, match="No checkpoint in .* verifies"):
        saved.latest(tree(0.0))


def test_a_kill_while_writing_leaves_the_earlier_one(saved):
    hidden = saved.folder / ".writing-00000030"
    shutil.copytree(saved.folder / "step_00000020" / "arrays", hidden / "arrays")
    assert_is(saved.latest(tree(0.0)), 20, 2.5)
    assert not hidden.exists()


def test_a_save_removes_what_a_failed_one_left(saved):
    (saved.folder / ".writing-00000025" / "arrays").mkdir(parents=True)
    saved.save(30, tree(3.5))
    assert sorted(path.name for path in saved.folder.iterdir()) == ["step_00000020", "step_00000030"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t | {"count": jnp.float32(7)}, "'count' as .*int32.*needs .*float32"),
        (lambda t: t | {"moments": [t["moments"][0], jnp.zeros(3)]}, r"'moments.1' as .*\[2\].*needs .*\[3\]"),
        (lambda t: t | {"more": jnp.zeros(1)}, r"differ in the arrays \['more'\]"),
    ],
)
def test_another_structure_is_refused(saved, change, words):
    with pytest.raises(ValueError, match=words):
        saved.latest(change(tree(0.0)))


def test_parts_of_a_device_are_averaged_for_another_number_of_them(tmp_path):
    store, parts = Checkpoints(tmp_path / "c"), np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    store.save(1, {"errors": jnp.asarray(parts), "count": jnp.int32(1)})
    like = {"errors": jnp.zeros((4, 2, 3)), "count": jnp.int32(0)}
    _, found, _ = store.latest(like, a_device="errors")
    np.testing.assert_array_equal(found["errors"], np.broadcast_to(parts.mean(0), (4, 2, 3)))
    with pytest.raises(ValueError, match="'errors' as"):
        store.latest(like)
    with pytest.raises(ValueError, match="'errors' as"):
        store.latest({"errors": jnp.zeros((4, 2, 5)), "count": jnp.int32(0)}, a_device="errors")


def test_full_disk(saved, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write", refuse)
    with pytest.raises(OSError, match=r"could not write step 30 .*No space left.*\[10, 20\]\) are untouched"):
        saved.save(30, tree(3.5))
    monkeypatch.undo()
    assert_is(saved.latest(tree(0.0)), 20, 2.5)
    assert [path.name for path in saved.folder.iterdir() if path.name.startswith(".")] == []


class TestOneSentence:
    """What Orbax's threads report beside it would be printed by `sys.unraisablehook`."""

    @pytest.fixture
    def reported(self, monkeypatch):
        found = []
        monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: found.append(unraisable.exc_value))
        yield found
        time.sleep(0.3)  # late threads
        assert found == []

    def arrays(self):
        return {f"a{i}": jnp.asarray(np.random.default_rng(i).normal(size=(200, 100))) for i in range(24)}

    def test_a_disk_that_is_really_full(self, saved, reported):
        """The system refuses files above 8 kB, as `ulimit -f` does."""
        resource = pytest.importorskip("resource")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
        try:
            with pytest.raises(OSError) as refused:
                saved.save(30, self.arrays())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert str(refused.value) == (
            f"Checkpoints could not write step 30 to {saved.folder}: File too large. Earlier checkpoints ([10, 20]) are"
            " untouched; free space or choose another --out, and run again."
        )

    def test_all_truncated(self, tmp_path, reported):
        store, arrays = Checkpoints(tmp_path / "c"), self.arrays()
        for step in (1, 2):
            store.save(step, arrays)
        for file in files(store.folder):
            if "arrays" in str(file):
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.warns(UserWarning, match="is damaged") as warned:
            with pytest.raises(ValueError, match="No checkpoint in .* verifies"):
                store.latest(arrays)
        for warning in warned:
            assert re.search(r"is damaged \([^\n]*\); trying the one before it.$", str(warning.message))
            assert "tensorstore_spec" not in str(warning.message)

    def test_other_reports_still_come(self, saved, reported):
        class Fails:
            def __del__(self):
                raise KeyError("not of Orbax")

        saved.save(30, tree(3.5))
        del_me = Fails()
        del del_me
        assert [type(error) for error in reported] == [KeyError]
        reported.clear()


def test_saving_a_step_again_replaces_it(saved):
    saved.save(20, tree(9.0), data={"next_index": 20})
    assert_is(saved.latest(tree(0.0)), 20, 9.0)


def test_every_storage_dtype_comes_back(tmp_path):
    arrays = [
        jnp.asarray(np.arange(6), dtype) for dtype in (jnp.uint8, jnp.int8, jnp.bfloat16, jnp.float16, jnp.float32)
    ]
    arrays += [jnp.asarray(np.arange(6).astype(ml_dtypes.float8_e4m3fn)), jnp.zeros((0, 3)), jnp.asarray(True)]
    (tmp_path / "c").mkdir()
    checkpoints.write(tmp_path / "c", arrays)
    back, _ = checkpoints.read(tmp_path / "c", arrays)
    for before, after in zip(arrays, back, strict=True):
        assert before.dtype == after.dtype and np.asarray(before).tobytes() == np.asarray(after).tobytes()
