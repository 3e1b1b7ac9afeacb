"""Where a model that is named lies: a folder, a name of the zoo, a path of an object store, or `hf://org/name` of a
hub, a file or folder of it, at a revision; and released models pushed to a hub.

Downloads resume and stay in the hub's own cache; its token and its other settings (`HF_TOKEN`, `HF_HOME`,
`HF_HUB_OFFLINE`, `HF_ENDPOINT`) are where `huggingface_hub` looks for them.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from t2i_jax import zoo
from t2i_jax.core.errors import ConfigError
from t2i_jax.storage.remote import resolve_path

HUB = re.compile(r"^hf:/+(?P<repo>[^/@]+/[^/@]+)(/(?P<part>[^@]+?))?/?(@(?P<revision>[^@]+))?$")
LEFT_OUT = ("*.h5", "*.ot", "*.onnx", "*.tflite", "*.msgpack", "onnx/*", "openvino/*", "*.md5", ".*")
"""Files of a repository that are copies of its weights for other programs."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def readable(path: str | Path) -> Path:
    """Where to read `path`: here, in the zoo, in an object store, or here after a download from a hub.

    A word that is a model of the zoo, `emoji-64`, is that model, and `emoji-64/codec` its codec, unless the working
    directory has a file or folder of that name. Errors: `ConfigError` as of `resolve_path`, and for a repository,
    revision or file that is not there, is closed to this user, or cannot be reached.
    """
    if re.match(r"^hf:/", str(path)):
        return from_hub(str(path))
    return zoo.find(path) or resolve_path(path)


def from_hub(path: str) -> Path:
    """The local copy of `hf://org/name[/part][@revision]`: the snapshot, or the part of it, a file or a folder."""
    found = HUB.match(path)
    if found is None:
        raise ConfigError(f"{path}: a model of a hub is hf://org/name, hf://org/name/file or hf://org/name@revision")
    repo, part, revision = found["repo"], found["part"], found["revision"]
    with hub_errors(path):
        from huggingface_hub import hf_hub_download, snapshot_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        if part:
            try:
                return Path(hf_hub_download(repo, part, revision=revision))
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:  # maybe a folder
                folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[f"{part}/*"]), part)
                if not folder.is_dir():
                    raise
                return folder
        left_out = [*LEFT_OUT, *map(glob.escape, copies(_files(repo, revision)))]
        return Path(snapshot_download(repo, revision=revision, ignore_patterns=left_out))


def _files(repo: str, revision: str | None) -> list[str]:
    """The files of a repository; none where the hub does not answer and a copy of an earlier call may be here."""
    from huggingface_hub import HfApi

    with contextlib.suppress(OSError, *_http_errors()):
        return HfApi().list_repo_files(repo, revision=revision)
    return []


def copies(files: Iterable[str]) -> list[str]:
    """Those of a repository's files that hold weights which others of them hold too.

    Pickled files of the same name as safetensors, halves (`.fp16.`) and weights without average (`.non_ema.`) of files
    that are there whole, and single files of a pipeline whose parts are in folders.

    >>> copies(["a/model.safetensors", "a/pytorch_model.bin", "a/model.fp16.safetensors", "a/other.pt"])
    ['a/model.fp16.safetensors', 'a/pytorch_model.bin']
    """
    names, found = set(files), []
    # `pytorch_model-00001-of-00002.bin` is a part of what `model.safetensors` holds.
    stem = lambda name: re.sub(r"pytorch_|-\d+-of-\d+", "", name.rpartition(".")[0])
    safe = {stem(name) for name in names if name.endswith(".safetensors")}
    for name in sorted(names):
        path = PurePosixPath(name)
        pickled = path.suffix in PICKLES and stem(name) in safe
        variant = re.sub(r"\.(fp16|non_ema)(?=[.-])", "", name)
        single = "model_index.json" in names and "/" not in name and path.suffix in (*PICKLES, ".safetensors")
        if pickled or single or (variant != name and variant in names):
            found.append(name)
    return found


def push(folder: str | Path, repo: str, private: bool = False) -> str:
    """Upload a released model, or released adapters, to a repository of a hub, which is made where it is not there;
    returns its address. Errors: `ConfigError`."""
    folder = Path(folder)
    if not (folder / "config.json").exists() or not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{folder}: neither a released model nor released adapters: t2i release RUN --out DIR first")
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", repo):
        raise ConfigError(f"{repo}: a repository is ORG/NAME")
    with hub_errors(f"hf://{repo}"):
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Released by t2i_jax")
        return f"hf://{repo}"


def hub_metadata(kind: str, task: str = "", *tags: str) -> str:
    """What a hub reads of a model card."""
    tagged = "".join(f"- {tag}\n" for tag in ("jax", kind.lower(), *tags))
    about = "library_name: t2i_jax\n" + (f"pipeline_tag: {task}\n" if task else "")
    return f"---\n{about}tags:\n{tagged}---\n"


@contextlib.contextmanager
def hub_errors(path: str) -> Iterator[None]:
    """Errors of the hub's library as `ConfigError`s of one line."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ConfigError(f"{path}: needs the package huggingface_hub: pip install 't2i_jax[hub]'")
    from huggingface_hub import errors

    kinds = (
        (errors.GatedRepoError, "its licence has to be accepted on the hub, and a token given: hf auth login"),
        (errors.RevisionNotFoundError, "the repository has no such revision"),
        (errors.RepositoryNotFoundError, "there is no such repository, or it is closed to you: hf auth login"),
        (errors.LocalEntryNotFoundError, "the hub cannot be reached, and no copy of it is here"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set, and no copy of it is here"),
        (errors.EntryNotFoundError, "the repository has no such file or folder"),
        (errors.HFValidationError, "this is no name of a repository"),
        (errors.LocalTokenNotFoundError, "no token is here: hf auth login"),
    )
    try:
        yield
    except tuple(kind for kind, _ in kinds) as error:
        raise ConfigError(f"{path}: {next(said for kind, said in kinds if isinstance(error, kind))}") from error
    except _http_errors() as error:
        raise ConfigError(f"{path}: the hub did not answer as it should: {str(error).splitlines()[0]}") from error


def _http_errors() -> tuple[type[Exception], ...]:
    """The base of all errors of the HTTP library that this version of the hub's library uses, and OSError."""
    from huggingface_hub import errors

    return tuple(base for base in errors.HfHubHTTPError.__bases__ if issubclass(base, Exception))
