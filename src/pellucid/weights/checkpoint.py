"""A model on disk, ready to be read: its config and its parameters, whatever the file format.

One idea: a `Checkpoint` yields exactly the parameters that the architecture declares, under
canonical names and shapes, mended (`folds.py`). Opening checks the whole plan against the file's
table of contents and reads no weights; so a missing, unknown or misshapen tensor is refused at
once, by its name. Tensors that need no mending are views of the mapped file: nothing is copied
until a backend does.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from ..config import ModelConfig
from ..errors import ConfigError, FormatError, UnsupportedError
from ..formats.tensor import HostTensor
from ..models.params import Param
from ..models.registry import get_architecture
from .names import Recipe, is_ignored

__all__ = ["Checkpoint", "Plan", "build_plan", "open_checkpoint", "read_plan"]

Plan = list[tuple[str, Recipe]]  # canonical name, how it is made


class Checkpoint(Protocol):
    """An open model. Use it as a context manager; its tensors may be views of the file, to be used
    up before it is closed.
    """

    @property
    def config(self) -> ModelConfig: ...

    @property
    def path(self) -> Path: ...

    @property
    def tokenizer_source(self) -> Path | Mapping[str, object]:
        """What the tokenizer is built from: a GGUF file's metadata, or the folder."""
        ...

    def parameters(self) -> Iterator[tuple[str, HostTensor]]:
        """Every declared parameter once: canonical name and tensor. May be asked for again."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a .gguf file, or a folder that holds config.json and safetensors."""
    from .gguf_checkpoint import GGUFCheckpoint
    from .safetensors_checkpoint import SafetensorsCheckpoint

    if path.is_dir():
        return SafetensorsCheckpoint.open(path)
    if not path.exists():
        raise ConfigError(f"model path is {str(path)!r}; there is no such file or folder")
    if path.suffix == ".safetensors":
        raise ConfigError(
            f"model path is {str(path)!r}; give the folder, which holds config.json beside it"
        )
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise UnsupportedError(
            f"{path} is a pickled checkpoint, which can run code when it is read; convert it to "
            "safetensors"
        )
    return GGUFCheckpoint.open(path)


def build_plan(
    config: ModelConfig,
    recipe: Callable[[ModelConfig, Param], Recipe],
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
) -> Plan:
    """How each declared parameter is made from the tensors of a file, given by name and shape.
    Raises where the two do not match.
    """
    plan = [
        (param.name, recipe(config, param))
        for param in get_architecture(config.architecture).parameters(config)
    ]
    for name, made in plan:
        if made.source not in shapes:
            raise FormatError(
                f"{where} lacks the tensor {made.source!r} (parameter {name} of "
                f"{config.architecture})"
            )
        if shapes[made.source] != made.shape:
            raise FormatError(
                f"{where}: tensor {made.source!r} has shape {list(shapes[made.source])}; its "
                f"config implies {list(made.shape)}"
            )
    known = {made.source for _, made in plan}
    extra = [name for name in shapes if name not in known and not is_ignored(name)]
    if extra:
        others = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise FormatError(
            f"{where} holds the tensor {extra[0]!r}{others}, which {config.architecture} with "
            "this config does not have"
        )
    return plan


def read_plan(plan: Plan, tensor: Callable[[str], HostTensor]) -> Iterator[tuple[str, HostTensor]]:
    """Carry the plan out, one parameter at a time, so that no more than one mended copy need be
    held.
    """
    for name, recipe in plan:
        source = tensor(recipe.source)
        yield name, source if recipe.fold is None else recipe.fold(source)
