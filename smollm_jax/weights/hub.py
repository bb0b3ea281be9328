"""Weights by their name on the Hugging Face hub, through huggingface_hub and its cache."""

import difflib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from smollm_jax.errors import InputFileError, StorageError
from smollm_jax.runtime.files import one_line

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)  # organisation/model
FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt"]
# Of the same weights in other layouts, and of runs; additional_chat_templates/ is taken.
NOT_FILES = ["*/*.safetensors", "*/*.json", "*/*.txt"]
OURS = ("assets", "runs", "data")  # folders of this project, whether they are there or not
SECONDS = 10.0  # that the hub may take for an answer


def locate(weights: str | Path) -> Path:
    """The path itself, or, where there is none, the folder that a model of this name on the hub is cached in.

    Fetched if it is not there; offline what is cached is taken. Raises `InputFileError` when the model cannot be had.
    A path wins over a name, and so does a path into a folder that exists: `runs/my-rum` is a mistyped path.
    """
    path = Path(weights)
    if path.exists():
        return path
    if not is_name(path):
        if near := _near(path):
            raise InputFileError(f"{path}: no such file or folder; perhaps {' or '.join(map(str, near))}")
        return path
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InputFileError(
            f"{path}: no such file or folder; as a name, a model on the Hugging Face hub needs huggingface_hub: "
            f"pip install huggingface_hub, then the same command fetches it"
        )
    try:
        folder = fetch(str(path))
    except InputFileError as error:
        raise InputFileError(f"{path}: no such file or folder; as a name, {error}") from error
    if not any(folder.glob("model*.safetensors")):
        raise InputFileError(
            f"{path}: no such file or folder; as a name, the Hugging Face hub's model has no model.safetensors: fetch "
            "the file of it that you want (a .gguf, say) and give its path"
        )
    print(f"{path}: the Hugging Face hub's model, kept in {folder}", file=sys.stderr, flush=True)
    return folder


def _near(path: Path) -> list[Path]:
    """Up to two paths that are there and whose last part is spelled almost as that of one that is not."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return []
    return [path.with_name(name) for name in difflib.get_close_matches(path.name, names, n=2, cutoff=0.75)]


def is_name(path: Path) -> bool:
    """Whether a path that does not exist can be a model's name: two parts, the first of them no folder here."""
    text = str(path)
    weights_file = path.suffix in (".pt", ".safetensors", ".gguf", ".bin", ".pth")
    return bool(NAME.fullmatch(text)) and path.parts[0] not in OURS and not path.parent.exists() and not weights_file


def fetch(name: str, **options: Any) -> Path:
    """The folder of a model's files: in the hub's own cache, unless the option `local_dir` names one.

    Needs huggingface_hub. Raises `InputFileError` with a sentence that names the model when it cannot be had.
    """
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    options |= {"allow_patterns": FILES, "ignore_patterns": NOT_FILES, "etag_timeout": SECONDS}
    try:  # `snapshot_download` itself would wait for an answer without end
        huggingface_hub.HfApi().model_info(name, timeout=SECONDS)
    except errors.HfHubHTTPError:  # an answer, which it asks for again
        pass
    except Exception:  # of the libraries under the client, which are others in each of its versions
        options["local_files_only"] = True
    try:
        return Path(huggingface_hub.snapshot_download(name, **options))
    except errors.GatedRepoError as error:
        why = f"{name} on the Hugging Face hub is gated: accept its terms on its page, then log in: hf auth login"
        raise InputFileError(why) from error
    except errors.RepositoryNotFoundError as error:
        why = f"the Hugging Face hub has no model {name}, or a private one, which needs: hf auth login"
        raise InputFileError(why) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        why = f"{name} is not in the cache of the Hugging Face hub, which cannot be reached"
        raise InputFileError(why) from error
    except Exception as error:  # the client and the libraries under it raise many kinds
        if isinstance(error, OSError) and error.filename:
            raise StorageError(f"{name}: cannot be kept: {error}") from error
        raise InputFileError(f"{name} could not be fetched from the Hugging Face hub: {one_line(error)}") from error
