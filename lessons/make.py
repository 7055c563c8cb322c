"""The lessons as notebooks, made from lessons/source/*.md.

    python -m lessons.make              lessons/NAME.ipynb for students, without answers
    python -m lessons.make --answers    lessons/answers/NAME.ipynb too, run from top to bottom, and
                                        its pictures as files

In a source a fenced block of Python is a cell of code, what stands between two is a cell of text. A
line that ends in #! is an answer: students get the lines behind #~ in its place. The next cell of
code must then fail with a message, and pass with the answer: both are tried. What stands between
<!-- answers --> and <!-- end --> is for the answers alone. A block `# setup` is source/setup.txt.
"""
import argparse
import base64
import re
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
SOURCES = sorted((HERE / "source").glob("*.md"))
SETUP = (HERE / "source/setup.txt").read_text(encoding="utf-8").strip()


def notebook(source, answers, tried=False):
    """The cells of a source, with or without the answers. tried: before each answer the students'
    lines, and the cell behind them, which has to fail."""
    text = source.read_text(encoding="utf-8")
    text = re.sub(r"<!-- answers -->\n(.*?)<!-- end -->\n?", r"\1" if answers else "", text,
                  flags=re.S)
    cells, parts = [], re.split(r"^```(?:python)?\n", text, flags=re.M)
    for i, part in enumerate(map(str.strip, parts)):
        if not i % 2 and part:
            cells.append(nbformat.v4.new_markdown_cell(part, id=f"{source.stem}-{i}"))
        elif i % 2:
            if tried and "#~" in part:
                cells += [code("\n".join(lines(part, False)), f"student-{i}"),
                          code("\n".join(lines(parts[i + 2].strip(), True)), f"student-{i}-test",
                               tags=["raises-exception"])]
            text = SETUP if part == "# setup" else "\n".join(lines(part, answers))
            cells.append(code(text, f"{source.stem}-{i}"))
    return nbformat.v4.new_notebook(cells=cells, metadata={
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"}})


def code(text, name, **metadata):
    return nbformat.v4.new_code_cell(text, id=name, metadata=metadata)


def lines(part, answers):
    """Of a cell of code, with its answers or with what students get."""
    for line in part.split("\n"):
        answer = line.endswith("#!")
        student = re.match(r"( *)#~ (.*)", line)
        if answer and answers:
            yield line[:-2].rstrip()
        elif student and not answers:
            yield student[1] + student[2]
        elif not answer and not student:
            yield line


def execute(notebook, where):
    """Run all cells in a folder, and keep those of the answers. ValueError where one prints to
    stderr, as warnings do, or where an empty cell is not told what is wrong."""
    NotebookClient(notebook, timeout=600, kernel_name="python3",
                   resources={"metadata": {"path": str(where)}}).execute()
    for cell in notebook.cells:
        errors = [output for output in cell.get("outputs", []) if output.output_type == "error"]
        if cell.metadata.get("tags"):
            if not errors or errors[0].ename != "AssertionError" or not errors[0].evalue:
                raise ValueError(f"an empty cell passes, or has no message:\n{cell.source}")
            print(f"    {errors[0].evalue}")
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise ValueError(f"a cell prints to stderr: {output['text']}")
    notebook.cells = [cell for cell in notebook.cells if not cell.id.startswith("student-")]
    for number, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
        cell.execution_count, cell.metadata = number, {}  # no times of this machine
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number


def save_pictures(notebook, name):
    """Its pictures as files, for slides."""
    (HERE / "pictures").mkdir(exist_ok=True)
    pictures = [output.data["image/png"] for cell in notebook.cells for output in
                cell.get("outputs", []) if "image/png" in output.get("data", {})]
    for number, picture in enumerate(pictures, 1):
        (HERE / "pictures" / f"{name}-{number}.png").write_bytes(base64.b64decode(picture))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", action="store_true")
    args = parser.parse_args()
    for source in SOURCES:
        nbformat.write(notebook(source, False), HERE / f"{source.stem}.ipynb")
        if args.answers:
            start, whole = time.time(), notebook(source, True, tried=True)
            print(f"{source.stem}: what an empty cell is told")
            execute(whole, HERE)
            (HERE / "answers").mkdir(exist_ok=True)
            nbformat.write(whole, HERE / "answers" / f"{source.stem}.ipynb")
            save_pictures(whole, source.stem)
            print(f"{source.stem}: {len(whole.cells)} cells, {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
