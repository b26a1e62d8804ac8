"""The notebooks of examples/notebooks run from top to bottom, say what they promise, and are stored without outputs."""

import json
import os
from importlib.util import find_spec

import pytest
from pages import ROOT

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
SAYS = {  # what has to be among the outputs
    "first_team": ["[['map']]", "[['map'], ['library'], ['stable']]", "reader1  latent  4 rows", "reader3 [4] [['map']]"],
    "what_agents_say": ["soft_token  Ben letter library . | Peter drum stable . | Olga map chapel ."],
    "train_and_audit": ["chance is 6", "it communicates: True", "[['map']]"],
}


def test_there_are_three():
    assert {n.stem for n in NOTEBOOKS} == set(SAYS)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_without_outputs(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(notebook, tmp_path, monkeypatch):
    missing = [name for name in ("nbclient", "nbformat", "ipykernel") if find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (make docs)")
    import nbclient
    import nbformat

    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    for name, value in (("PYTHONPATH", os.pathsep.join(paths)), ("OMP_NUM_THREADS", "1"), ("IPYTHONDIR", str(tmp_path))):
        monkeypatch.setenv(name, value)
    done = nbformat.read(notebook, as_version=4)
    nbclient.NotebookClient(done, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    out = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in out)
    for expected in SAYS[notebook.stem]:
        assert expected in text, f"{expected!r} is not in\n{text}"
