"""The lessons as notebooks, made from lessons/source/*.md.

    python -m lessons.make              lessons/NAME.ipynb for students, without answers
    python -m lessons.make --answers    lessons/answers/NAME.ipynb too, run from top to bottom

In a source a fenced block of Python is a cell of code, what stands between two is a cell of text. A
line that ends in #! is an answer: students get the lines behind #~ in its place. What stands
between <!-- answers --> and <!-- end --> is for the answers alone. A block `# setup` is SETUP.
"""
import argparse
import re
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
SOURCES = sorted((HERE / "source").glob("*.md"))
SETUP = '''\
# The lesson needs the files of its repository. Where they are missing, as in a hosted notebook, they are fetched.
import importlib.util
import io
import os
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

ADDRESS = "https://github.com/OWNER/lora-family"  # of the repository, in this one place
here = Path.cwd()
found = [folder for folder in (here, *here.parents, here / "lora-family-main") if (folder / "lora.py").exists()]
if not found:
    try:
        with urllib.request.urlopen(f"{ADDRESS}/archive/refs/heads/main.zip") as answer:
            zipfile.ZipFile(io.BytesIO(answer.read())).extractall(here)
    except OSError as e:
        raise SystemExit(f"put this notebook into the folder lessons/ of {ADDRESS}, which cannot be fetched: {e}") from None
    found = [here / "lora-family-main"]
os.chdir(found[0])
if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
# torch and numpy are kept as they are, only what is missing is installed
missing = [name for name in ("tiktoken", "tokenizers", "regex", "safetensors", "pyarrow", "filelock", "tqdm", "matplotlib")
           if not importlib.util.find_spec(name)]
if missing:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *missing], check=True)
# a file that you change is read again: no restart is needed
%load_ext autoreload
%autoreload 2'''


def notebook(source, answers):
    """The cells of a source, with or without the answers."""
    text = source.read_text(encoding="utf-8")
    text = re.sub(r"<!-- answers -->\n(.*?)<!-- end -->\n?", r"\1" if answers else "", text,
                  flags=re.S)
    cells = []
    for i, part in enumerate(re.split(r"^```(?:python)?\n", text, flags=re.M)):
        code, part = i % 2, part.strip()
        if code:
            part = SETUP if part == "# setup" else "\n".join(lines(part, answers))
        if part:
            new = nbformat.v4.new_code_cell if code else nbformat.v4.new_markdown_cell
            cells.append(new(part, id=f"{source.stem}-{i}"))
    return nbformat.v4.new_notebook(cells=cells, metadata={
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"}})


def lines(code, answers):
    for line in code.split("\n"):
        answer = line.endswith("#!")
        student = re.match(r"( *)#~ (.*)", line)
        if answer and answers:
            yield line[:-2].rstrip()
        elif student and not answers:
            yield student[1] + student[2]
        elif not answer and not student:
            yield line


def execute(cells, where):
    """Run all cells in a folder; ValueError where one prints to stderr, as warnings do."""
    NotebookClient(cells, timeout=600, kernel_name="python3",
                   resources={"metadata": {"path": str(where)}}).execute()
    for cell in cells.cells:
        cell.metadata = {}  # no times of this machine
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise ValueError(f"a cell prints to stderr: {output['text']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", action="store_true")
    args = parser.parse_args()
    for source in SOURCES:
        nbformat.write(notebook(source, False), HERE / f"{source.stem}.ipynb")
        if args.answers:
            start, cells = time.time(), notebook(source, True)
            execute(cells, HERE)
            (HERE / "answers").mkdir(exist_ok=True)
            nbformat.write(cells, HERE / "answers" / f"{source.stem}.ipynb")
            print(f"{source.stem}: {len(cells.cells)} cells, {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
