"""`openimp push`: writes a model's folder with a model card, and uploads it to the Hugging Face Hub."""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi

from openimp.checkpoint.folder import CONFIG, RECIPE, name_file_copies
from openimp.common.errors import UserError, library_errors
from openimp.common.names import Name, is_bundled, single_names
from openimp.common.progress import console
from openimp.common.versions import openimp_version
from openimp.data.files import DEMO
from openimp.encoding.find import is_public
from openimp.inference.model import Model, load
from openimp.inference.model_card import model_card
from openimp.inference.public_recipe import shorten_paths
from openimp.recipe.file import override, to_yaml
from openimp.recipe.schema import Recipe


def push(
    run: Path,
    name: str,
    to: Path | None = None,
    private: bool = False,
    license: str | None = None,
    overrides: Iterable[str] = (),
) -> None:
    """Uploads a model to the repository `name` (OWNER/NAME) of the Hub, or only writes it to the folder `to`.

    `license` is the Hub's identifier of the model's license. `overrides` state licenses of sources, as in
    `sources.photos.license=CC-BY-4.0`. If the repository exists, the upload is a new commit.
    """
    model = load(run, "cpu")
    model.recipe = _with_licenses(model.recipe, overrides)
    if to is not None:
        write(model, name, license, to)
        console.print(f"{to}: weights, recipe and model card; read README.md before you publish it", soft_wrap=True)
    else:
        console.print(upload(model, name, private, license), soft_wrap=True)


def upload(
    model: Model,
    name: str,
    private: bool,
    license: str | None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Uploads a model that `load` opened, and returns the URL. `Model.push_to_hub` explains the arguments."""
    hub = HfApi(token=token)
    message = f"{model.config.name}, written by openimp {openimp_version()}"
    with TemporaryDirectory() as folder:
        write(model, name, license, Path(folder))
        with library_errors(f"{name}: the upload to the Hugging Face Hub failed"):
            url = hub.create_repo(name, private=private or None, exist_ok=True)
            # `create_repo` leaves a repository that exists as it is.
            if private and not hub.model_info(name).private:
                raise UserError(f"{name} exists and is public; make it private in its settings, or choose another name")
            if revision is not None:
                hub.create_branch(name, branch=revision, exist_ok=True)
            hub.upload_folder(repo_id=name, folder_path=folder, commit_message=message, revision=revision)
    return str(url)


def write(model: Model, name: str, license: str | None, folder: Path) -> None:
    """Writes what `load` needs, recipe.yaml, README.md, and the notices of bundled training data, to an empty folder.

    `name` is the name of the repository, or of a model that comes with openimp.
    """
    if "/" not in name and not is_bundled(name):
        raise UserError(f"{name}: expected OWNER/NAME")
    if model.folder is None:
        raise UserError("only a model that openimp.load opened can be published; save it and load it")
    if is_public(model.recipe):
        raise UserError("openimp did not train this public model, so there is nothing to publish; load it by its name")
    for stem, options in model.config.modalities.items():
        tower = getattr(options, "tower", None)
        tower_names = [Name.parse(part) for part in single_names(tower)] if tower is not None else []
        if any(part.scheme is None or part.folder for part in tower_names):
            raise UserError(
                f"modalities.{stem}.tower: {tower} is on this machine; publish the tower, and train again with its "
                "name on the Hub"
            )
    card = model_card(model, model.folder, name, license)
    model.save(folder)
    # The two files that may have paths of this machine are written again without them.
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps(shorten_paths(config), indent=1, ensure_ascii=False), encoding="utf-8")
    recipe = shorten_paths(model.recipe.to_dict())
    name_file_copies(recipe, model.modalities)
    (folder / RECIPE).write_text(to_yaml(recipe), encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
    if any(is_bundled(str(source.path)) for source in model.recipe.training_sources.values()):
        for notice in DEMO.glob("NOTICE*"):
            shutil.copy(notice, folder)


def _with_licenses(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    data = recipe.to_dict()
    for text in overrides:
        if not re.match(r"\s*sources\.[^.=]+\.license\s*=", text):
            raise UserError(f"--set {text}: only the license of a source can be changed: sources.NAME.license=LICENSE")
        override(data, text)
    return Recipe.build(data)
