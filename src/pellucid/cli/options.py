"""Options that several commands share, and their conversion to configs.

The options of the engine and of sampling are built from the declarations of `EngineConfig` and
`SamplingParams`: a field that is added there becomes an option here, with its type, help and
default. Names and meanings are vLLM's; a few short ones are llama.cpp's.
"""

import functools
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args, get_origin

import click

from ..backends.registry import BACKENDS
from ..checks import Declaration, declarations
from ..engine_config import EngineConfig
from ..errors import FormatError
from ..files import parse_json, read_bytes
from ..sampling_params import SamplingParams
from ..weights.catalogue import DEFAULT_MODEL
from .spare_threads import spare_blas_threads

__all__ = [
    "DEBUG",
    "EngineOptions",
    "ModelOptions",
    "Sampling",
    "SamplingOptions",
    "debug_option",
    "engine_options",
    "json_option",
    "loading_options",
    "model_options",
    "options_of",
    "sampling_options",
    "template_options",
]

DEBUG = "pellucid.debug"  # in click's Context.meta: show tracebacks

MAX_TEMPLATE = 1 << 20  # bytes
_Command = Callable[..., Any]

# Fields of EngineConfig that matter for a single request too. The others matter for many at once.
_FOR_ONE_REQUEST = (
    *(
        "max_model_len",
        "kv_cache_dtype",
        "quantization",
        "speculative",
        "num_speculative_tokens",
        "backend",
    ),
)
_FOR_GENERATION = ("speculative", "num_speculative_tokens")
# Not made into options: the engine's seed (--seed sets the requests'), and fields with their own
# options.
_NO_ENGINE_OPTION = ("seed", "backend_options")
_NO_SAMPLING_OPTION = ("detokenize", "structured_outputs")
_SHORT_NAMES = {"max_tokens": "-n"}


def _set_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.meta[DEBUG] = True


debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_set_debug,
    help="Show a traceback where something fails.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object, for programs."
)


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """The values of `model_options`: the model, and how it is run."""

    name: str
    values: Mapping[str, Any]

    def fields(self) -> dict[str, Any]:
        """Keywords for `build_engine_config`: the options that the user gave."""
        return dict(self.values)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The values of `engine_options`: how many requests share the engine."""

    values: Mapping[str, Any]

    def fields(self) -> dict[str, Any]:
        """Keywords for `build_engine_config`: the options that the user gave."""
        return dict(self.values)


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """The values of `sampling_options`: how tokens are chosen."""

    said: Mapping[str, Any]  # by the user
    max_tokens: int | None  # used if neither the user nor the model's authors set it
    use_recommendation: bool

    def check(self) -> None:
        """Raise ConfigError for a value that is not allowed, before a model is loaded."""
        self.choose({}).params()

    def choose(self, recommended: Mapping[str, float | int]) -> "Sampling":
        """The user's values, else the recommendations of the model's authors, else greedy."""
        by_model = dict(recommended) if self.use_recommendation else {}
        plain = {"temperature": 0.0, "max_tokens": self.max_tokens}
        return Sampling({**plain, **by_model, **self.said}, by_model.keys() - self.said.keys())


@dataclass(frozen=True, slots=True)
class Sampling:
    """Fields of SamplingParams, and who chose them."""

    values: Mapping[str, Any]
    by_model: Set[str]  # those that the model's authors recommend

    def params(self) -> SamplingParams:
        """The parameters. Raises ConfigError, naming the field, for a value that is not allowed."""
        return SamplingParams(**self.values)

    def __str__(self) -> str:
        parts = []
        for name, value in self.values.items():
            if value is None:
                continue
            whose = " (the model's)" if name in self.by_model else ""
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            parts.append(f"{name} {shown}{whose}")
        return ", ".join(parts)


def options_of(config: Any, argument: str) -> Callable[[_Command], _Command]:
    """An option for each field of a config class: the command gets what was said as `argument`."""
    return _gathered(declarations(config), argument)


def loading_options(command: _Command) -> _Command:
    """What concerns the loading of a model: the command gets what was said as `loading`."""
    chosen = _loading_declarations()

    @functools.wraps(command)
    def gather(*args: Any, **rest: Any) -> Any:
        return command(*args, loading=_take_loading(chosen, rest), **rest)

    return _with_options(gather, chosen)


def _gathered(chosen: Sequence[Declaration], argument: str) -> Callable[[_Command], _Command]:
    def decorate(command: _Command) -> _Command:
        @functools.wraps(command)
        def gather(*args: Any, **rest: Any) -> Any:
            said = _take(chosen, rest)
            return command(*args, **{argument: said}, **rest)

        return _with_options(gather, chosen)

    return decorate


def _loading_declarations() -> list[Declaration]:
    chosen = [d for d in declarations(EngineConfig) if d.name in _FOR_ONE_REQUEST]
    for kind in BACKENDS.values():
        chosen += declarations(kind.options)
    return chosen


def model_options(*, generates: bool = True) -> Callable[[_Command], _Command]:
    """-m and what concerns its loading: the command gets them as one argument, `model`.

    `generates`: False for a command that only scores a text, for which drafts mean nothing.
    """
    chosen = [d for d in _loading_declarations() if generates or d.name not in _FOR_GENERATION]

    def decorate(command: _Command) -> _Command:
        @functools.wraps(command)
        def gather(*args: Any, model: str, **rest: Any) -> Any:
            values = _take_loading(chosen, rest)
            return command(*args, model=ModelOptions(model, values), **rest)

        named = click.option(
            "-m",
            "--model",
            default=DEFAULT_MODEL,
            show_default=True,
            metavar="MODEL",
            help="A .gguf file, a folder of safetensors, a name (see `pellucid list`), or "
            "ORG/NAME[:QUANT] of the Hugging Face hub.",
        )
        return named(_with_options(gather, chosen))

    return decorate


def engine_options(command: _Command) -> _Command:
    """The options for many requests at once. The command gets them as one argument, `engine`."""
    left_out = (*_FOR_ONE_REQUEST, *_NO_ENGINE_OPTION)
    chosen = [d for d in declarations(EngineConfig) if d.name not in left_out]

    @functools.wraps(command)
    def gather(*args: Any, **rest: Any) -> Any:
        values = _take(chosen, rest)
        return command(*args, engine=EngineOptions(values), **rest)

    return _with_options(gather, chosen)


def sampling_options(
    max_tokens: int | None, *, leave_out: tuple[str, ...] = ()
) -> Callable[[_Command], _Command]:
    """The options of sampling. The command gets them as one argument, `sampling`.

    `max_tokens`: the default of the command. `leave_out`: fields that it does not use.
    """
    left_out = (*_NO_SAMPLING_OPTION, *leave_out)
    chosen = [d for d in declarations(SamplingParams) if d.name not in left_out]

    def decorate(command: _Command) -> _Command:
        @functools.wraps(command)
        def gather(*args: Any, generation_config: str, **rest: Any) -> Any:
            said = _take(chosen, rest)
            if said.get("max_tokens") == -1:
                said["max_tokens"] = None
            sampling = SamplingOptions(said, max_tokens, generation_config == "auto")
            return command(*args, sampling=sampling, **rest)

        source = click.option(
            "--generation-config",
            type=click.Choice(["auto", "none"]),
            default="auto",
            show_default=True,
            help="Defaults of the options of sampling: what the model's authors recommend, or "
            "none: greedy decoding.",
        )
        return source(_with_options(gather, chosen, {"max_tokens": max_tokens}))

    return decorate


def template_options(command: _Command) -> _Command:
    """The options of chat templates. The command gets the keywords of `render_chat` as one
    argument, `template`.
    """

    @functools.wraps(command)
    def gather(
        *args: Any,
        chat_template: str | None,
        chat_template_kwargs: dict[str, Any] | None,
        **rest: Any,
    ) -> Any:
        said = {"chat_template": chat_template, "chat_template_kwargs": chat_template_kwargs}
        template = {name: value for name, value in said.items() if value is not None}
        return command(*args, template=template, **rest)

    named = click.option(
        "--chat-template",
        type=_Template(),
        help="A template in place of the model's: a file, a text, or the name of one of the "
        "model's own.",
    )
    variables = click.option(
        "--chat-template-kwargs",
        type=_JsonObject(),
        help="Variables for the chat template, such as '{\"enable_thinking\": false}'.",
    )
    return named(variables(gather))


# ---- from a declaration to an option


def _with_options(
    command: _Command, chosen: Sequence[Declaration], defaults: Mapping[str, Any] | None = None
) -> _Command:
    """`defaults`: the command's defaults that differ from those of the declarations."""
    for declaration in reversed(chosen):
        command = _option(declaration, defaults or {})(command)
    return command


def _option(declared: Declaration, defaults: Mapping[str, Any]) -> Callable[[_Command], _Command]:
    """The option of a field. Its default is None, which means that the user did not give it."""
    flag = "--" + declared.name.replace("_", "-")
    names = [_SHORT_NAMES[declared.name], flag] if declared.name in _SHORT_NAMES else [flag]
    help_text = _help(declared, defaults)
    if declared.type is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", default=None, help=help_text)
    kind, metavar, multiple = _type(declared)
    return click.option(*names, type=kind, metavar=metavar, multiple=multiple, help=help_text)


def _type(declared: Declaration) -> tuple[Any, str | None, bool]:
    """(click's type, the value's name in the help, whether the option may be repeated)."""
    if declared.name == "backend":
        return click.Choice(list(BACKENDS)), None, False
    if declared.choices:
        return click.Choice(declared.choices), None, False
    if declared.unit in ("bytes", "GiB"):
        return _Size(declared.unit), None, False
    if declared.type in (int, float):
        return declared.type, "N" if declared.type is int else "X", False
    if get_origin(declared.type) is Mapping:
        return _Bias(), None, True
    parts = get_args(declared.type)
    if get_origin(declared.type) is Sequence and get_args(parts[0])[0] is int:
        return int, "ID", True
    if declared.type is str:
        return str, "NAME", False
    return str, "TEXT", True  # strings, or one of them


def _help(declared: Declaration, defaults: Mapping[str, Any]) -> str:
    """The field's help, and its default in click's form."""
    text, _, unsaid = declared.help.partition("None: ")
    text = text.rstrip(" ;.") if declared.name != "backend" else "What computes"
    default = unsaid or declared.default
    if declared.name == "max_tokens":
        text += "; -1: as many as the context holds"
        default = defaults[declared.name] or -1
    elif declared.name == "temperature":
        default = "0"
    if _type(declared)[2]:
        text += "; may be given several times"
    if isinstance(default, bool):
        default = "yes" if default else "no"
    return f"{text}.  [default: {default}]" if default is not None else f"{text}."


def _take(chosen: Sequence[Declaration], options: dict[str, Any]) -> dict[str, Any]:
    """Remove the given options from a command's arguments; convert them to field types."""
    said = {}
    for declared in chosen:
        value = options.pop(declared.name)
        if value is None or value == ():
            continue
        said[declared.name] = dict(value) if get_origin(declared.type) is Mapping else value
        if isinstance(value, tuple) and get_origin(declared.type) is not Mapping:
            said[declared.name] = list(value)
    return said


def _take_loading(chosen: Sequence[Declaration], options: dict[str, Any]) -> dict[str, Any]:
    """`_take` of what concerns the loading of a model. A command imports NumPy after this."""
    said = _take(chosen, options)
    default = next(declared.default for declared in chosen if declared.name == "backend")
    spare_blas_threads(said.get("backend", default))
    return said


class _Size(click.ParamType):  # type: ignore[type-arg]
    """Memory: a number in the field's unit, a number with a unit, or a share of what is free."""

    name = "SIZE"
    units: ClassVar[dict[str, int]] = {
        "GiB": 1 << 30,
        "MiB": 1 << 20,
        "KiB": 1 << 10,
        "GB": 10**9,
        "MB": 10**6,
        "B": 1,
    }

    def __init__(self, unit: str) -> None:
        self._in_bytes = unit == "bytes"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | float:
        text = str(value).strip()
        unit = next((unit for unit in self.units if text.endswith(unit)), "")
        try:
            number = float(text.removesuffix(unit))
        except ValueError:
            examples = "bytes, 512MiB, 4GiB, or a share such as 0.5" if self._in_bytes else "4GiB"
            self.fail(f"{value!r} is not a size: give {examples}", param, ctx)
        if not 0 <= number < 1 << 62:
            self.fail(f"{value!r} is not a size above 0", param, ctx)
        if unit:
            number *= self.units[unit]
            return int(number) if self._in_bytes else number / (1 << 30)
        return int(number) if self._in_bytes and number >= 1 else number


class _Bias(click.ParamType):  # type: ignore[type-arg]
    """A token id and what is added to its logit."""

    name = "ID=X"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, float]:
        token_id, _, bias = str(value).partition("=")
        try:
            return int(token_id), float(bias)
        except ValueError:
            self.fail(f"{value!r} must be a token id, =, and a number: 42=-1.5", param, ctx)


class _JsonObject(click.ParamType):  # type: ignore[type-arg]
    name = "JSON"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, object]:
        try:
            return parse_json(str(value).encode(), "the value")
        except (FormatError, UnicodeError) as error:
            self.fail(str(error), param, ctx)


class _Template(click.ParamType):  # type: ignore[type-arg]
    """The text of the file with that name, if there is one; otherwise the value itself."""

    name = "TEMPLATE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        path = Path(text)
        try:
            is_file = "{" not in text and path.exists()
        except OSError:  # too long for a name
            is_file = False
        if not is_file:
            return text
        try:
            return read_bytes(path, MAX_TEMPLATE).decode()
        except (FormatError, UnicodeError) as error:
            self.fail(str(error), param, ctx)
