"""Finds the folder of a model of openimp by its name."""

from collections.abc import Collection
from pathlib import Path

from openimp.checkpoint.folder import CONFIG, RECIPE, checkpoints
from openimp.common.errors import UserError, library_errors, nearest
from openimp.common.names import BUNDLED, HUB, OPEN_CLIP, OPEN_CLIP_CONFIG, SCHEMES, HubName, Name
from openimp.common.safe_files import refuse_links

BUNDLED_MODELS = Path(__file__).parent.parent / "models"


def model_name(name: str | Path) -> str:
    """The name of a model as text; UserError if it is something else, such as an opened model."""
    if not isinstance(name, str | Path):
        raise UserError(f"expected the name or the folder of a model, found {type(name).__name__}")
    return name.as_posix() if isinstance(name, Path) else name


def find_own_model(name: str | Path) -> Path:
    """The folder of a model: a run's newest checkpoint, or the folder with config.json that the name means.

    A model of the Hugging Face Hub is downloaded, unless it has been already.
    """
    name = model_name(name)
    scheme, identifier = Name.parse(name)
    if scheme == BUNDLED:
        if identifier not in bundled_names():
            raise UserError(f"{name}: openimp comes with no such model{nearest(identifier, bundled_names())}")
        return BUNDLED_MODELS / identifier
    if scheme == HUB:
        return _find_local(download(str(name), ("*.json", "*.safetensors", RECIPE)))
    if scheme is not None:
        raise UserError(
            f"{name}: expected a folder, openimp:NAME, hub:OWNER/NAME, open_clip:NAME/TAG or "
            "conse:timm:NAME+sentence_transformers:NAME for a model"
        )
    folder = Path(name).expanduser()
    if not folder.exists():
        typed_scheme, colon, _ = name.partition(":")
        hint = nearest(typed_scheme, SCHEMES) if colon else ""
        hint = hint or "; a model on the Hugging Face Hub is named hub:OWNER/NAME"
        raise UserError(f"{name}: no such folder{hint}")
    return _find_local(folder)


def bundled_names() -> list[str]:
    """The names of the models that come with openimp, without their scheme."""
    return sorted(file.parent.name for file in BUNDLED_MODELS.glob(f"*/{CONFIG}"))


def _find_local(path: Path) -> Path:
    refuse_links(path)
    if (path / CONFIG).exists():
        return path
    saved = checkpoints(path)
    if not saved:
        hint = ""
        if (path / "index.json").exists():
            hint = "; it is an index, for openimp search and serve"
        elif (path / OPEN_CLIP_CONFIG).exists():
            hint = f"; a model of open_clip in a folder is named {OPEN_CLIP}:{path}"
        raise UserError(f"{path}: no model here; expected a run with a checkpoint, or a folder with config.json{hint}")
    return saved[-1]


def download(name: str, patterns: Collection[str]) -> Path:
    """The files of a model of the Hugging Face Hub that match the patterns. `name` is SCHEME:OWNER/NAME[@REVISION]."""
    scheme, identifier = Name.parse(name)
    hub_name = HubName.parse(identifier)
    if hub_name is None:
        raise UserError(f"{name}: expected {scheme}:OWNER/NAME or {scheme}:OWNER/NAME@REVISION")
    from huggingface_hub import snapshot_download

    with library_errors(f"{name}: the Hugging Face Hub did not provide the model"):
        folder = snapshot_download(
            hub_name.repository,
            revision=hub_name.revision,
            allow_patterns=list(patterns),
            ignore_patterns=["optimizer*"],
        )
    return Path(folder)
