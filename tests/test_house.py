"""The arrows between the rooms of the house run one way, and a method's page stands by itself."""
import ast
import sys

from conftest import ROOT

# Lowest first: a room may import from its own row and from those above it in this list
ROOMS = (("loss", "lora", "evaluation.metrics"),
         ("model", "rslora", "reslora", "deltalora", "qlora", "baselines"),
         ("methods",),
         ("checkpoints",),
         ("data", "pretraining.world", "pretraining.opinions"),
         ("evaluation",),
         ("run",),
         ("train", "generate"),
         ("compare",),
         ("experiments", "lessons", "pretraining.vocabulary"))
FLOOR = {name: floor for floor, names in enumerate(ROOMS) for name in names}


def modules():
    """{dotted name: path} of all Python outside the tests and the examples."""
    files = [*ROOT.glob("*.py"), *(file for file in ROOT.glob("*/*.py")
                                   if file.parent.name not in ("tests", "examples", "out"))]
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files}
    return {name.removesuffix(".__init__"): file for file, name in names.items()}


def imports(path):
    """Every module that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(name):
    """Of the longest part of a dotted name that is a room; None for what is not ours."""
    parts = name.split(".")
    rooms = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((FLOOR[room] for room in rooms if room in FLOOR), None)


def test_no_file_imports_from_a_higher_room():
    """At its top or inside a function."""
    wrong = [(name, other) for name, file in modules().items() if name != "pretraining"
             for other in imports(file) if (floor(other) or 0) > floor(name)]
    assert not wrong


def test_a_method_is_two_files_and_torch():
    """Whoever copies a page and lora.py into a project needs nothing else of ours."""
    files = {name: file for name, file in modules().items()
             if name.startswith("baselines.")
             or name in ("lora", "rslora", "reslora", "deltalora", "qlora")}
    for file in files.values():
        roots = {other.split(".")[0] for other in imports(file)}
        assert not roots - set(sys.stdlib_module_names) - {"torch", "lora"}, file
