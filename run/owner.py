"""Whose files are these? A run folder is written by one run at a time, and only what this program
wrote there is ever replaced or removed.

    .written    the names of our files in the folder; every other file is somebody else's
    .again      a new run over a finished one, until it has finished too

A name is put on the list before its file is written and taken off when there is no such file. So
after a kill each file of ours is on the list, and no file of others is.
"""
import getpass
import hashlib
import re
import shutil
import tempfile
from pathlib import Path

import filelock

from checkpoints import tokenizers
from checkpoints.files import read_json, write_json

STATE, LOG = "resume.safetensors", "log.csv"
RESULTS = ("README.md", "curve.png", "ranks.png", "adapter_config.json",
           "adapter_model.safetensors",
           *(f"predictions-{split}.jsonl" for split in ("train", "validation", "test")),
           *(f"merged/{name}" for name in ("config.json", "generation_config.json",
                                           "model.safetensors", *tokenizers.FILES)),
           "result.json")  # the last one to appear: with it a run has finished
LIST, AGAIN = ".written", ".again"


def lock(path, wait=False):
    """Hold what no other process of this user may hold at the same time; a kill releases it.
    ValueError where somebody holds it, unless `wait`."""
    name = hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:24]
    held = filelock.FileLock(Path(tempfile.gettempdir()) / f"lora-{getpass.getuser()}-{name}.lock")
    try:
        held.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        raise ValueError(f"another run is writing to {path}: wait until it has ended, or choose "
                         "another --out") from None
    return held


class RunFolder:
    """A run folder `out`, and `place`, where the run in progress writes: `out`, or .again in it
    where `out` holds a finished run."""

    def __init__(self, out):
        self.out, self.place, self.held = out, out, None

    def state(self):
        """The file to resume from: that of a run that has not finished, if there is one."""
        path = self.out / AGAIN / STATE
        return path if path.exists() else self.out / STATE

    def written(self):
        """The names on the list."""
        path = self.out / LIST
        names = read_json(path).get("files") if path.exists() else []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path} is damaged: it must hold the names of our files")
        return set(names)

    def check(self, *names):
        """ValueError for the first name at which stands what we did not write."""
        ours = self.written()
        for name in names:
            path, listed = self.out / name, name in ours
            for part in (self.out / name.partition("/")[0], path):
                if part.is_symlink():
                    raise ValueError(f"{part} is a link, and a run would write there: choose "
                                     "another --out")
            if path.exists() and not (listed and (path.is_file() or name == AGAIN)):
                raise ValueError(f"{path} was not written by a run of this program, and is kept: "
                                 "choose another --out")

    def claim(self):
        """Become the one run that writes here."""
        self.held = lock(self.out)
        self.check(STATE, LOG, *RESULTS, AGAIN)
        known = {Path(name).name for name in (STATE, LOG, LIST, *RESULTS)}
        for folder in (self.out, self.out / "merged", self.out / AGAIN):
            for part in folder.glob("*.part"):  # of a run that was killed while it wrote
                if re.sub(r"\.\w{8}\.part$", "", part.name) in known and not part.is_symlink():
                    part.unlink()
        if (self.out / AGAIN / "result.json").exists():  # killed while it took the old one's place
            self.place = self.out / AGAIN
            self.settle()
            self.place = self.out
        if (self.out / "result.json").exists() or (self.out / AGAIN).exists():
            self.place = self.out / AGAIN

    def begin(self, *names):
        """Put names on the list: their files are about to be written."""
        names = {AGAIN} if self.place != self.out else set(names)
        ours = self.written()
        if not names <= ours:
            self.check(*names)
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / LIST, {"files": sorted(ours | names)})
        self.place.mkdir(exist_ok=True)

    def clear(self):
        """Remove what an earlier run has left in the place where this one writes."""
        if self.place == self.out:
            self.remove(self.written())
        elif self.place.exists():
            shutil.rmtree(self.place)

    def remove(self, names):
        for name in names - {AGAIN}:
            (self.out / name).unlink(missing_ok=True)
        if (self.out / "merged").is_dir() and not any((self.out / "merged").iterdir()):
            (self.out / "merged").rmdir()

    def settle(self):
        """The run has finished: what stands in .again takes the place of the run before."""
        if self.place != self.out:
            again, self.place = self.place, self.out
            files = again / LIST  # complete from here on, however often this is interrupted
            if not files.exists():
                write_json(files, {"files": [name for name in (STATE, LOG, *RESULTS)
                                             if (again / name).exists()]})
            new = read_json(files)["files"]
            self.begin(*new)
            self.remove((self.written() & set(RESULTS)) - set(new))
            for name in new:  # result.json comes last
                if (again / name).exists():
                    (self.out / name).parent.mkdir(exist_ok=True)
                    (again / name).replace(self.out / name)
            shutil.rmtree(again)
        self.tidy()

    def tidy(self):
        """Take off the list what is not there, and remove a folder in which nothing stands."""
        names = self.written()
        left = sorted(name for name in names if (self.out / name).exists())
        if left and len(left) < len(names):
            write_json(self.out / LIST, {"files": left})
        elif not left:
            (self.out / LIST).unlink(missing_ok=True)
        if not self.out.is_symlink() and not any(self.out.iterdir()):
            self.out.rmdir()

    def release(self):
        """Let others write here."""
        if self.held:
            if self.out.is_dir():
                self.tidy()
            self.held.release()
            self.held = None
