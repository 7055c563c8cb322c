"""lesson.ipynb as it is committed: with its outputs, and exercises that name tests which exist.
That it runs, and that its claims hold, is said by `jupyter execute lesson.ipynb`: the claims are
assertions in its cells."""
import json
import re

from conftest import ROOT

CELLS = json.loads((ROOT / "lesson.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
TEXT = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown"]


def test_every_cell_was_run_in_order_and_nothing_went_wrong():
    """No error and nothing on stderr, where warnings go, in the outputs that are committed. Every
    chapter has drawn a picture and asserted what it claims."""
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    kinds = {output.get("name", output["output_type"]) for cell in CODE
             for output in cell["outputs"]}
    assert kinds <= {"stdout", "display_data", "execute_result"}
    chapters = len(re.findall(r"^## \d\.", "\n".join(TEXT), re.M))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    claims = sum(bool(re.search(r"^ *assert ", "".join(cell["source"]), re.M)) for cell in CODE)
    assert 0 < chapters <= min(pictures, claims)


def test_the_tests_that_the_exercises_name_exist():
    files = [file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("*.py")]
    tests = {name for text in files for name in re.findall(r"def (test_\w+)", text)}
    named = {name for text in TEXT for name in re.findall(r"`(test_\w+)`", text)}
    assert len(named) >= 6 and named <= tests
