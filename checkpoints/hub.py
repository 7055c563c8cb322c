"""Files from the Hugging Face hub, or from its cache on this machine when the hub cannot be reached."""
import http.client
import threading
import urllib.error
import urllib.request
from pathlib import Path


def fetch(repo, patterns, repo_type="model", revision=None, cache_dir=None):
    """Local folder with the files of a repository that match `patterns`. OSError or ValueError when they can neither be
    downloaded nor found in the cache. A hub that cannot be reached costs at most 5 seconds, not the client's
    retries."""
    from huggingface_hub import constants, snapshot_download  # slow to import, and a local folder needs neither
    offline = constants.HF_HUB_OFFLINE or not reachable(f"{constants.ENDPOINT}/api/{repo_type}s/{repo}")
    try:
        return Path(snapshot_download(repo, repo_type=repo_type, revision=revision, allow_patterns=patterns,
                                      cache_dir=cache_dir, local_files_only=offline))
    except (OSError, ValueError):
        raise
    except Exception as e:  # a connection lost on the way: the client's network layer has errors of its own
        raise OSError(f"{repo}: {e}") from e


def reachable(url, seconds=5):
    """Whether a server answers at all. In a thread, because a name lookup has no timeout of its own."""
    answers = []

    def ask():
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds):
                answers.append(True)
        except urllib.error.HTTPError:  # it answers, if only to say no
            answers.append(True)
        except (OSError, http.client.HTTPException, ValueError):  # no route, name or answer; no HTTP; no URL
            return
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)
