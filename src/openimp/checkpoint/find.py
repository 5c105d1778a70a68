"""Finds the folder of a model by its name."""

import re
from pathlib import Path

from openimp.checkpoint.folder import checkpoints
from openimp.checkpoint.wrapped import wrapped_folder
from openimp.common.errors import UserError
from openimp.common.safe_files import refuse_links
from openimp.recipe.model import LIBRARY


def model_folder(path: Path) -> Path:
    """The folder of a model: `path` itself if it has config.json, else the newest checkpoint of the run `path`.

    If `path` is the name of a model of open_clip, it is converted to a folder in the cache, unless it has been already.
    """
    if str(path).startswith(LIBRARY):
        return wrapped_folder(str(path))
    refuse_links(path)
    if (path / "config.json").exists():
        return path
    found = checkpoints(path)
    if not found:
        raise UserError(f"{path}: no model here; expected a run with a checkpoint, or a folder with config.json")
    return found[-1]


def find_model(name: str) -> Path:
    """The folder of a model: a local one, or one that is downloaded from the Hugging Face Hub unless it is cached.

    `name` is a path, or OWNER/NAME or OWNER/NAME@REVISION on the Hub. With the prefix "hub:" it is never a path. With
    the prefix "open_clip:" it is a model of open_clip; see `wrapped`.
    """
    path, on_hub = Path(name), re.fullmatch(r"(hub:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if name.startswith(LIBRARY) or path.exists():
        return model_folder(path)
    if not on_hub or (not on_hub[1] and (path.parts[0] == "runs" or path.parent.is_dir())):
        raise UserError(f"{name}: no such folder; a model on the Hugging Face Hub is named hub:OWNER/NAME")
    from huggingface_hub import snapshot_download

    allowed, ignored = ["*.json", "*.safetensors"], ["optimizer*"]
    try:
        folder = snapshot_download(on_hub[2], revision=on_hub[3], allow_patterns=allowed, ignore_patterns=ignored)
    except Exception as error:  # huggingface_hub raises its own errors, httpx's, or OSError.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].removeprefix("Got: ")
        local = "" if on_hub[1] else "there is no local folder of this name, and "
        raise UserError(f"{name}: {local}the Hugging Face Hub did not provide the model: {reason}") from None
    return model_folder(Path(folder))
