"""Every notebook runs from top to bottom, and is kept with outputs small enough to be shown on a web page."""

import pathlib
import platform

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES = 600_000


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_kept_with_its_outputs(path):
    assert path.stat().st_size < MAX_BYTES
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run it once, in order, and save"
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert not [output for output in outputs if output.output_type == "error"]


SHORTER = {  # fewer steps, layers and widths; every other line as it stands
    "01_quest_in_ten_minutes": {
        "steps=300": "steps=40",
        "digits(8192, 0)": "digits(1024, 0)",
        "for bits in (4, 3, 2, 1)}}": "for bits in (4, 2)}}",
        "(256, 256), (2, 3, 4)": "(256, 256), (2,)",
        "np.arange(3)": "np.arange(1)",
    },
    "02_packed_kernels": {
        "nnx.Linear(512, 1024,": "nnx.Linear(512, 512,",  # its kernel is then of the shape of `down`'s
        "nnx.Linear(1024, 512,": "nnx.Linear(512, 512,",
        "widths = range(1, 9)": "widths = [3, 4]",
        "for bits in (1, 2, 3, 4, 6, 8):": "for bits in (3, 8):",
        "[1, 2, 3, 4, 6, 8]": "[3, 8]",
    },
    "03_train_sharded": {"layers=2": "layers=1", "steps=20": "steps=3"},
}
RUNS = [(path, False) for path in NOTEBOOKS]
RUNS += [pytest.param(path, True, marks=pytest.mark.slow) for path in NOTEBOOKS if path.stem in SHORTER]


@pytest.mark.parametrize(("path", "whole"), RUNS, ids=lambda v: getattr(v, "stem", "whole" if v else "short"))
@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client", "ignore::ResourceWarning")
def test_runs(path, whole, monkeypatch):
    """In a kernel of its own; the first cell that raises fails the test with its traceback. As it is kept when asked
    for slow tests, and here with the numbers of `SHORTER` and hardly an optimization."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    kept = products_that_ran(notebook)
    changes = {} if whole else SHORTER.get(path.stem, {})
    for before, after in changes.items():
        holds = [cell for cell in notebook.cells if cell.cell_type == "code" and before in cell.source]
        assert holds, f"{path.stem} no longer says {before!r}"
        for cell in holds:
            cell.source = cell.source.replace(before, after)
    if changes:
        monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    if platform.machine().lower() in ("x86_64", "amd64"):  # elsewhere other products are chosen
        assert products_that_ran(notebook) == kept, f"{path.stem} keeps what lb.explain said once: run it, and save"


def products_that_ran(notebook):
    """The column "ran" of every table of `lb.explain` among the outputs."""
    streams = [output for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output]
    lines = "".join(output.text for output in streams).splitlines()
    found = []
    for start, header in enumerate(lines):
        if header.startswith("layer ") and header.endswith("  ran"):
            column = len(header) - len("ran")
            for line in lines[start + 2 :]:
                if line[column - 2 : column] != "  ":  # the lines below the table
                    break
                found.append(line[column:])
    return found


def test_explained_products_are_found():
    table = "layer  bits  ran\n-----  ----  ---\na      4     dot s8\nb            dot f32\nin high precision: c\n"
    cell = nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("stream", text=table)])
    assert products_that_ran(nbformat.v4.new_notebook(cells=[cell])) == ["dot s8", "dot f32"]
