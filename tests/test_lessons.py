"""lessons/ as it is committed: notebooks made from their sources, answers with their outputs,
exercises that name tests which exist. That the lessons run, that their claims hold, and that an
empty cell is told what is wrong, is said by `python -m lessons.make --answers`."""
import json
import re

import pytest
from conftest import ROOT

from lessons import make

NAMES = [source.stem for source in make.SOURCES]


def cells(path):
    return json.loads((ROOT / "lessons" / path).read_text(encoding="utf-8"))["cells"]


def text(cell):
    return "".join(cell["source"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("answers", [False, True])
def test_a_notebook_is_what_its_source_says(name, answers):
    """Cell by cell; the students' one has no outputs and no answers."""
    made = make.notebook(ROOT / f"lessons/source/{name}.md", answers).cells
    found = cells(f"{'answers/' * answers}{name}.ipynb")
    assert [(cell["cell_type"], text(cell)) for cell in found] == [(cell.cell_type, cell.source)
                                                                  for cell in made]
    if not answers:
        assert not any(cell.get("outputs") for cell in found)
        assert "YOUR TURN" in str(found) and "## Answers" not in str(found)


@pytest.mark.parametrize("name", NAMES)
def test_the_answers_were_run_in_order_and_nothing_went_wrong(name):
    """No error and nothing on stderr, where warnings go."""
    code = [cell for cell in cells(f"answers/{name}.ipynb") if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.get("name", output["output_type"]) for cell in code
             for output in cell["outputs"]}
    assert kinds <= {"stdout", "display_data", "execute_result"}


@pytest.mark.parametrize("name", NAMES)
def test_every_chapter_asserts_what_it_claims(name):
    """Between two headings "## 1." stands at least one assertion."""
    chapters = re.split(r"^## \d\.", (ROOT / f"lessons/source/{name}.md").read_text(), flags=re.M)
    assert len(chapters) > 4 and all(re.search(r"^ *assert ", chapter, re.M)
                                     for chapter in chapters[1:])


def test_the_notebooks_are_small():
    files = [*(ROOT / "lessons").glob("*.ipynb"), *(ROOT / "lessons/answers").glob("*.ipynb")]
    assert sum(file.stat().st_size for file in files) < 2e6


def test_the_tests_that_the_answers_name_exist():
    tests = {name for file in (ROOT / "tests").glob("*.py")
             for name in re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8"))}
    named = {name for source in make.SOURCES
             for name in re.findall(r"`(test_\w+)`", source.read_text(encoding="utf-8"))}
    assert len(named) >= 6 and named <= tests
