"""Files from the Hugging Face hub, or from its cache on this machine when the hub cannot be
reached."""
import http.client
import threading
import urllib.error
import urllib.request
from pathlib import Path


def fetch(repo, patterns, repo_type="model", revision=None, cache_dir=None, away=None):
    """Local folder with the files of a repository that match `patterns`. OSError or ValueError when
    they can neither be downloaded nor found in the cache. A hub that cannot be reached costs at
    most 5 seconds, not the client's retries. away: whether it cannot be reached, if that is known.
    """
    # slow to import, and a local folder needs neither
    from huggingface_hub import constants, snapshot_download
    away = offline(repo, repo_type) if away is None else away
    try:
        return Path(snapshot_download(repo, repo_type=repo_type, revision=revision,
                                      allow_patterns=patterns, cache_dir=cache_dir,
                                      local_files_only=away))
    except (OSError, ValueError):
        # `datasets` keeps files without the name of their revision
        kept = Path(cache_dir or constants.HF_HUB_CACHE, f"{repo_type}s--{repo.replace('/', '--')}",
                    "snapshots")
        for folder in sorted(kept.glob("*"),
                             key=lambda folder: -folder.stat().st_mtime) if away else ():
            if all(any(folder.glob(pattern)) for pattern in patterns):
                return folder
        raise
    # a connection lost on the way: the client's network layer has errors of its own
    except Exception as e:
        raise OSError(f"{repo}: {e}") from e


def reason(error):
    """Why something did not come from the hub, and what to do about it, in words."""
    name, text = type(error).__name__, str(error)
    if name == "GatedRepoError" or "awaiting a review" in text:
        return ("it asks you to accept a licence: open its page on the hub, accept, and log in "
                "with `hf auth login`")
    if "Invalid credentials" in text or "Invalid user token" in text or "401" in text[:60]:
        return ("the hub refuses your token, or there is no such name: `hf auth login` takes "
                "another token, `hf auth logout` removes it")
    if name == "RepositoryNotFoundError":
        return "the hub has no such name"
    if name == "LocalEntryNotFoundError":
        return ("the hub does not answer, or HF_HUB_OFFLINE is set, and the cache on this machine "
                "does not hold all of it")
    return f"it is not on the hub ({name})"


def offline(repo, repo_type):
    """Whether the hub is not to be asked, or does not answer."""
    from huggingface_hub import constants
    return (constants.HF_HUB_OFFLINE
            or not reachable(f"{constants.ENDPOINT}/api/{repo_type}s/{repo}"))


def tables(repo, patterns, revision=None, first=None):
    """{split: [row as a dict]} of a dataset on the hub by `datasets`, which keeps it in its cache;
    patterns: {split: its files}. first: only so many rows, streamed, so that no more is downloaded.
    OSError or ValueError for what is not to be had."""
    import datasets
    try:
        stream = datasets.load_dataset(repo, data_files=patterns, revision=revision,
                                      streaming=bool(first))
        return {split: list(stream[split].take(first)) if first else stream[split].to_list()
                for split in patterns}
    except (OSError, ValueError):
        raise
    except Exception as e:  # `datasets` and its network layer have errors of their own
        raise OSError(f"{repo}: {e}") from e


def reachable(url, seconds=5):
    """Whether a server answers at all. In a thread, because a name lookup has no timeout of its
    own."""
    answers = []

    def ask():
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"),
                                        timeout=seconds):
                answers.append(True)
        except urllib.error.HTTPError:  # it answers, if only to say no
            answers.append(True)
        # no route, name or answer; no HTTP; no URL
        except (OSError, http.client.HTTPException, ValueError):
            return
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)
