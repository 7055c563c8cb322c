"""lesson.ipynb as it is committed: short cells, with their outputs, and exercises that name tests which exist. That it
runs, and that its claims hold, is said by `jupyter execute lesson.ipynb`: the claims are assertions in its cells."""
import json
import re

from conftest import ROOT

FILE = ROOT / "lesson.ipynb"
CELLS = json.loads(FILE.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
TEXT = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown"]


def test_every_cell_was_run_in_order_and_nothing_went_wrong():
    """No error and nothing on stderr, where warnings go, in the outputs that are committed."""
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    kinds = {output.get("name", output["output_type"]) for cell in CODE for output in cell["outputs"]}
    assert kinds <= {"stdout", "display_data", "execute_result"}


def test_a_cell_is_read_at_a_glance_and_the_file_opens_on_the_web():
    assert max(len("".join(cell["source"]).splitlines()) for cell in CODE) <= 15
    assert FILE.stat().st_size < 1.5e6


def test_each_chapter_has_its_parts():
    """A question, an equation, code, a picture, what one should see, assertions, an exercise with its answer."""
    chapters, current = {}, None
    for cell in CELLS:
        source = "".join(cell["source"])
        if found := re.search(r"^## (\d)\.", source, re.M):
            current = chapters.setdefault(int(found[1]), [])
        elif source.startswith("## Answers"):
            break
        if current is not None:
            current.append(cell)
    assert list(chapters) == [1, 2, 3, 4, 5, 6, 7]
    *_, answers = TEXT
    for number, cells in chapters.items():
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        assert all(part in text for part in ("**Question.**", "**What you should see.**", f"**Exercise {number}.**"))
        assert "$" in text or number == 7  # chapter 7 has a table in place of an equation
        assert re.search(r"^(    )?assert ", code, re.M)
        assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))
        assert f"**{number}.**" in answers


def test_the_tests_that_the_exercises_name_exist():
    tests = {name for file in (ROOT / "tests").glob("*.py") for name in re.findall(r"def (test_\w+)", file.read_text())}
    named = {name for text in TEXT for name in re.findall(r"`(test_\w+)`", text)}
    assert len(named) >= 6 and named <= tests


def test_the_address_stands_in_one_place():
    assert FILE.read_text().count("https://github.com/") == 1
