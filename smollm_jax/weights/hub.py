"""Models by their name on the Hugging Face hub, downloaded with huggingface_hub into its cache."""

import difflib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from smollm_jax.errors import InputFileError, StorageError
from smollm_jax.runtime.files import one_line

MODEL_NAME = re.compile(  # organisation/model, and perhaps the commit, tag or branch to take
    r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@\w[\w.-]*)?", re.ASCII
)
FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt"]
# Subfolders hold the same weights in other layouts, or runs; the .jinja files of additional_chat_templates/ are taken.
IGNORED_FILES = ["*/*.safetensors", "*/*.json", "*/*.txt"]
LOCAL_FOLDERS = ("assets", "runs", "data")  # of this project: never the name of an organisation
TIMEOUT_SECONDS = 10.0


def locate(weights: str | Path) -> Path:
    """The path itself if it exists, else the cache folder of the model with this name on the hub.

    The model is downloaded if it is not cached; offline the cached one is used. `ORGANISATION/MODEL@REVISION` names a
    commit, so that later calls get the same files; the line printed says which. Raises `InputFileError` if there is
    neither. A path whose parent folder exists is never taken as a name: `runs/my-rum` is a mistyped path.
    """
    path = Path(weights)
    if path.exists():
        return path
    if not is_name(path):
        if similar := _similar_paths(path):
            raise InputFileError(f"{path}: no such file or folder; perhaps {' or '.join(map(str, similar))}")
        return path
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InputFileError(
            f"{path}: no such file or folder; to download a model of this name from the Hugging Face hub, "
            "first pip install huggingface_hub"
        )
    try:
        folder, commit = fetch(str(path))
    except InputFileError as error:
        raise InputFileError(f"{path}: no such file or folder, and {error}") from error
    if not any(folder.glob("model*.safetensors")):
        raise InputFileError(
            f"{path}: no such file or folder, and the Hugging Face hub's model has no model.safetensors: download "
            "the file you want (for example a .gguf) and give its path"
        )
    print(
        f"{path}: using the Hugging Face hub's model at commit {commit}, cached in {folder}",
        file=sys.stderr,
        flush=True,
    )
    return folder


def _similar_paths(path: Path) -> list[Path]:
    """Up to two existing paths in the same folder with a similar name."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return []
    return [path.with_name(name) for name in difflib.get_close_matches(path.name, names, n=2, cutoff=0.75)]


def is_name(path: Path) -> bool:
    """Whether a path that does not exist can be a model's name: two parts, the first of them not a local folder."""
    text = str(path)
    weights_file = path.suffix in (".pt", ".safetensors", ".gguf", ".bin", ".pth")
    if weights_file or not MODEL_NAME.fullmatch(text):
        return False
    return path.parts[0] not in LOCAL_FOLDERS and not path.parent.exists()


def fetch(name: str, **options: Any) -> tuple[Path, str]:
    """Downloads a model's files, all of one commit, and returns their folder and the commit.

    The folder is in the hub's cache, unless the option `local_dir` is given. `name` may end with @REVISION.

    Needs huggingface_hub. Raises `InputFileError` that names the model if it cannot be downloaded.
    """
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    options |= {"allow_patterns": FILES, "ignore_patterns": IGNORED_FILES, "etag_timeout": TIMEOUT_SECONDS}
    repository, _, revision = name.partition("@")
    options["revision"] = revision or None
    commit = None
    try:  # `snapshot_download` itself would wait for an answer forever
        commit = huggingface_hub.HfApi().model_info(repository, revision=revision or None, timeout=TIMEOUT_SECONDS).sha
    except errors.HfHubHTTPError:  # the hub answered; `snapshot_download` gets the same answer below
        pass
    except Exception:  # the HTTP library under the client, and so its errors, differ between versions
        options["local_files_only"] = True
    try:
        if "local_dir" not in options:  # the cache has a folder for each commit, and notes that of the default branch
            folder = Path(huggingface_hub.snapshot_download(repository, **options))
            return folder, folder.name
        options["revision"] = commit or options["revision"]
        return Path(huggingface_hub.snapshot_download(repository, **options)), str(commit)
    except errors.GatedRepoError as error:
        message = f"{name} on the Hugging Face hub is gated: accept its terms on its page, then log in: hf auth login"
        raise InputFileError(message) from error
    except errors.RevisionNotFoundError as error:
        raise InputFileError(f"the Hugging Face hub's {repository} has no revision {revision}") from error
    except errors.RepositoryNotFoundError as error:
        message = f"the Hugging Face hub has no model {name}; if it is private, log in first: hf auth login"
        raise InputFileError(message) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        message = f"{name} is not in the local cache and the Hugging Face hub cannot be reached"
        raise InputFileError(message) from error
    except Exception as error:  # the client and the libraries under it raise many types
        if isinstance(error, OSError) and error.filename:
            raise StorageError(f"{name}: cannot be saved: {error}") from error
        raise InputFileError(f"{name} could not be downloaded from the Hugging Face hub: {one_line(error)}") from error
