"""Imports in lowbit_jax only go down the floors; the kernels know nobody; Flax and Optax stay in their rooms."""

import ast
import pathlib

import pytest

FLOORS = (
    {"formats"},
    {"rounding", "coding", "packing"},
    {"scaling"},
    {"rotation", "sparsity"},
    {"estimators", "qtensor", "slots"},
    {"quantizer"},
    {"gptq"},
    {"ops"},
    {"methods"},
    {"nn", "optim", "io"},
    {"parallel"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ROOMS_WITH = {  # third-party package -> the rooms that may import it
    "jax": set(FLOOR_OF) - {"formats"},  # formats are frozen numbers: numpy and ml_dtypes only
    "flax": {"nn"},
    "optax": {"optim"},
    "orbax": set(),
}
ROOT = pathlib.Path(__file__).parents[1]
LIBRARY = ROOT / "lowbit_jax"
KERNELS = ROOT / "pallas_kernels"
DOOR = LIBRARY / "ops" / "backend.py"
FILES = sorted(LIBRARY.rglob("*.py"))


def room_of(path: pathlib.Path) -> str:
    """The folder or file of `lowbit_jax` that the path lies in; `__init__` for the front door."""
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def imported(path: pathlib.Path) -> set[str]:
    """Absolute dotted names that the file imports, at any depth; `from a import b` counts as `a.b`.

    What stands under `if TYPE_CHECKING:` is read by people and type checkers only, and does not count."""
    names = set()
    tree = ast.parse(path.read_text())
    for node in [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING")]:
        node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write {node.module or '.'} as an absolute import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_library_was_found():
    assert {room_of(path) for path in FILES} == {"__init__", *FLOOR_OF}, (
        "a room without a floor, or a floor without a room"
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_go_down(path):
    room, names = room_of(path), imported(path)
    if room == "__init__":
        return  # the front door opens every room
    used = {name.split(".")[1] for name in names if name.startswith("lowbit_jax.")}
    below = {other for other, floor in FLOOR_OF.items() if floor < FLOOR_OF[room]}
    wrong = sorted(used - {room} - below)
    assert not wrong, f"{path} imports {wrong}, not on a lower floor (front-door names count)"
    assert "lowbit_jax" not in names, f"{path} imports the front door; name the room instead"
    packages = {name.split(".")[0] for name in names}
    closed = sorted(package for package, rooms in ROOMS_WITH.items() if package in packages and room not in rooms)
    assert not closed, f"{path} imports {closed}, which belong to the rooms {[ROOMS_WITH[p] for p in closed]}"


def test_one_door_to_the_kernels():
    users = {path for path in FILES if any(name.startswith("pallas_kernels") for name in imported(path))}
    assert users <= {DOOR}, f"only {DOOR} may import pallas_kernels, found {sorted(users - {DOOR})}"
    for path in KERNELS.rglob("*.py"):
        known = sorted(name for name in imported(path) if name.startswith("lowbit_jax"))
        assert not known, f"{path} imports {known}; kernels take plain arrays"


def test_no_private_jax():
    """`jax._src` changes without notice: the peers that use it break at every release."""
    users = {str(path) for path in FILES if any(name.startswith("jax._src") for name in imported(path))}
    assert not users
