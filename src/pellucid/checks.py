"""Checks by declaration: a dataclass declares its fields once, and types and bounds are checked
from the declarations.

    @dataclass(frozen=True, kw_only=True)
    class Config:
        block_size: int = option(16, low=1, high=1024, help="tokens per KV block")

        def __post_init__(self) -> None:
            check_fields(self)

`check_fields` reads annotations and bounds. It converts values of the same meaning (NumPy integers
and floats, arrays of them, an int for a float) and copies lists and mappings. It refuses everything
else in one sentence: the field, its value, what is allowed. A bool is not an integer, and NaN and
infinity are not numbers. The command line builds its options from the same `declarations`.

Known types: bool, int, float, str, Literal of strings, a class (an instance is expected), object
(anything), list, Sequence, tuple[T, ...], Mapping, unions of these, and None. `Annotated[T,
Bounds(…)]` bounds an entry of a list or mapping.
"""

import functools
import math
import numbers
import operator
import reprlib
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from .errors import ConfigError, PellucidError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "Bounds",
    "Declaration",
    "check_fields",
    "check_value",
    "declarations",
    "option",
    "show",
    "unknown_name",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Limits of a number, of the characters of a string, or of the entries of a list or mapping.
    None: no limit.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None  # a lower limit that is itself not allowed
    below: float | None = None  # an upper limit that is itself not allowed

    def hold(self, number: float) -> bool:
        """True if the number is within all limits."""
        return (
            (self.low is None or number >= self.low)
            and (self.high is None or number <= self.high)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def words(self) -> str:
        """The limits as text after a noun: " between 0 and 1", " above 0", or nothing."""
        if self.low is not None and self.high is not None:
            return f" between {_number(self.low)} and {_number(self.high)}"
        lower, upper = self._ends("of ")
        return " " + " and ".join(filter(None, (lower, upper))) if lower or upper else ""

    def count(self) -> str:
        """The limits as text before a noun: "1 to 8", "at most 8"."""
        if self.low is not None and self.high is not None:
            return f"{_number(self.low)} to {_number(self.high)}"
        return " and ".join(filter(None, self._ends("")))

    def _ends(self, of: str) -> tuple[str, str]:
        """The lower and the upper limit in words; "" if there is none."""
        lower = f"above {_number(self.above)}" if self.above is not None else ""
        if self.low is not None:
            lower = f"{of}at least {_number(self.low)}"
        upper = f"below {_number(self.below)}" if self.below is not None else ""
        if self.high is not None:
            upper = f"{'' if lower else of}at most {_number(self.high)}"
        return lower, upper


_NO_BOUNDS = Bounds()


class _Told(NamedTuple):
    """The data that `option` stores in a field's metadata."""

    bounds: Bounds
    help: str
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """One declared field, for a command line that builds an option from it."""

    name: str
    type: object  # as annotated, without None
    is_optional: bool  # None is allowed
    default: object  # dataclasses.MISSING if there is none
    bounds: Bounds
    choices: tuple[str, ...]  # of a Literal
    help: str
    unit: str  # "", "tokens", "bytes", "GiB", …


def option(
    default: object = MISSING,
    *,
    default_factory: Callable[[], object] | None = None,
    help: str = "",
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with its default, its help text and its bounds (see `Bounds`).

    `help` is one line without a full stop; it says what the value is and what None means.
    """
    told = _Told(Bounds(low=low, high=high, above=above, below=below), help, unit)
    if default_factory is not None:
        return field(default_factory=default_factory, metadata={"option": told})
    if default is MISSING:
        return field(metadata={"option": told})
    return field(default=default, metadata={"option": told})


def check_fields(
    config: "DataclassInstance", *, prefix: str = "", error: type[PellucidError] = ConfigError
) -> None:
    """Check every field of a dataclass against its declaration, and store it as declared.

    Raises `error` with one sentence that begins with `prefix` and the field's name. Call it from
    `__post_init__`; it also writes to frozen classes.
    """
    for name, kind in _kinds_of(type(config)):
        value = getattr(config, name)
        try:
            taken = kind.take(value)
        except _Wrong as wrong:
            raise error(f"{prefix}{name}{wrong}") from None
        if taken is not value:
            object.__setattr__(config, name, taken)


def check_value(
    name: str, value: object, declared: object, *, error: type[PellucidError] = ConfigError
) -> Any:
    """`value`, checked and converted to the type `declared`. Raises `error` with a sentence about
    `name`.
    """
    try:
        return _kind(declared, _NO_BOUNDS).take(value)
    except _Wrong as wrong:
        raise error(f"{name}{wrong}") from None


def declarations(config: "type[DataclassInstance]") -> tuple[Declaration, ...]:
    """The fields of a config class that a caller can give, in order."""
    hints = get_type_hints(config, include_extras=True)
    found = []
    for member in fields(config):
        if not member.init:
            continue
        told = _told(member)
        members = [part for part in _members(hints[member.name]) if part is not types.NoneType]
        declared = functools.reduce(operator.or_, members)
        factory = member.default_factory
        found.append(
            Declaration(
                name=member.name,
                type=declared,
                is_optional=len(members) < len(_members(hints[member.name])),
                default=member.default if factory is MISSING else factory(),
                bounds=told.bounds,
                choices=get_args(declared) if get_origin(declared) is Literal else (),
                help=told.help,
                unit=told.unit,
            )
        )
    return tuple(found)


def unknown_name(
    what: str, name: object, known: Iterable[str], elsewhere: Mapping[str, str] | None = None
) -> str:
    """The sentence about a name that does not exist: it has the nearest name and all names.

    `elsewhere` maps names of other engines to the text that replaces the nearest name.
    """
    import difflib  # only this error needs it

    names = sorted(known)
    near = difflib.get_close_matches(str(name)[:100], names, n=1)
    if elsewhere is not None and isinstance(name, str) and name in elsewhere:
        hint = f": {elsewhere[name]}"
    else:
        hint = f"; did you mean {near[0]!r}?" if near else ""
    separator = " The" if hint.endswith("?") else "; the"
    return f"there is no {what} {show(name)}{hint}{separator} names are: {', '.join(names)}"


# ---- values in messages


class _Short(reprlib.Repr):
    """A repr that stays short and fast for any untrusted value."""

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 128:
            return f"an integer of {x.bit_length()} bits"
        return repr(x)

    def repr_bytes(self, x: bytes, level: int) -> str:
        return repr(x[: self.maxstring]) + ("…" if len(x) > self.maxstring else "")

    repr_bytearray = repr_bytes


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 60


def show(value: object) -> str:
    """A value as messages show it: short, on one line."""
    return " ".join(_SHORT.repr(value).split())


def _number(limit: float) -> str:
    """A limit as people write it: 1000000, not 1e+06, and 2⁶³ as an integer."""
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


# ---- from a declared type to its check


class _Wrong(Exception):
    """A refused value. Its text ends the sentence that begins with the field's name."""

    def __init__(self, sentence: str, *, is_inside: bool = False) -> None:
        super().__init__(sentence)
        self.is_inside = is_inside  # the value has the type, and something in it is wrong


class _Kind(NamedTuple):
    """How values of one declared type are checked and converted."""

    noun: str  # "an integer between 1 and 8"
    take: Callable[[object], object]  # the value as declared; raises _Wrong
    plural: str = "values"  # "integers"


@functools.cache
def _kinds_of(config: "type[DataclassInstance]") -> tuple[tuple[str, _Kind], ...]:
    hints = get_type_hints(config, include_extras=True)
    return tuple(
        (member.name, _kind(hints[member.name], _told(member).bounds))
        for member in fields(config)
        if member.init
    )


def _told(member: "Field[Any]") -> _Told:
    told = member.metadata.get("option", _Told(_NO_BOUNDS, "", ""))
    assert isinstance(told, _Told)
    return told


def _members(declared: object) -> tuple[object, ...]:
    """The alternatives of a union; a tuple of one for every other type."""
    return get_args(declared) if get_origin(declared) in (Union, types.UnionType) else (declared,)


@functools.cache
def _kind(declared: object, bounds: Bounds) -> _Kind:
    """The check of an annotation; `bounds` are those of the field that has it."""
    members = _members(declared)
    if len(members) > 1:
        return _union([_kind(member, bounds) for member in members])
    origin, arguments = get_origin(declared), get_args(declared)
    if origin is Annotated:
        return _kind(arguments[0], arguments[1])
    if origin is Literal:
        return _choice(arguments)
    if declared in _SCALARS:
        return _SCALARS[declared](bounds)
    if declared is types.NoneType:
        return _Kind("None", _take_none)
    if declared in (object, Any):
        return _Kind("anything", lambda value: value)
    if origin in (list, Sequence, tuple):
        return _collection(
            tuple if origin is tuple else list, _kind(arguments[0], _NO_BOUNDS), bounds
        )
    if origin is Mapping:
        return _mapping(_kind(arguments[0], _NO_BOUNDS), _kind(arguments[1], _NO_BOUNDS), bounds)
    assert isinstance(declared, type), f"a field is declared as {declared}, which has no check"
    return _instance(declared)


def _refuse(value: object, noun: str) -> _Wrong:
    return _Wrong(f" is {show(value)}; it must be {noun}")


def _union(kinds: list[_Kind]) -> _Kind:
    noun = ", or ".join(kind.noun for kind in kinds)
    is_optional = any(kind.take is _take_none for kind in kinds)

    def take(value: object) -> object:
        if value is None and is_optional:
            return None
        for kind in kinds:
            try:
                return kind.take(value)
            except _Wrong as wrong:
                if wrong.is_inside:
                    raise
        raise _refuse(value, noun)

    return _Kind(noun, take)


def _choice(choices: tuple[object, ...]) -> _Kind:
    noun = f"one of: {', '.join(map(str, choices))}"

    def take(value: object) -> object:
        if not isinstance(value, str) or value not in choices:
            raise _refuse(value, noun)
        return str(value)

    return _Kind(noun, take)


def _boolean(_: Bounds) -> _Kind:
    def take(value: object) -> object:
        if isinstance(value, bool):
            return value
        raise _refuse(value, "True or False")

    return _Kind("True or False", take)


def _integer(bounds: Bounds) -> _Kind:
    noun = f"an integer{bounds.words()}"

    def take(value: object) -> object:
        # int and everything that can be an index: NumPy's integers, but no float and no string
        number = _asked(operator.index, value, noun)
        if isinstance(value, bool) or not bounds.hold(number):
            raise _refuse(value, noun)
        return number

    return _Kind(noun, take, "integers")


def _real(bounds: Bounds) -> _Kind:
    noun = f"a number{bounds.words()}"

    def take(value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise _refuse(value, noun)
        number = _asked(float, value, noun)
        if not math.isfinite(number) or not bounds.hold(number):
            raise _refuse(value, noun)
        return number

    return _Kind(noun, take, "numbers")


def _string(bounds: Bounds) -> _Kind:
    noun = "a string" + (f" of {bounds.count()} characters" if bounds != _NO_BOUNDS else "")

    def take(value: object) -> object:
        if not isinstance(value, str) or not bounds.hold(len(value)):
            raise _refuse(value, noun)
        return value if type(value) is str else str(value)

    return _Kind(noun, take, "strings")


def _take_none(value: object) -> object:
    if value is None:
        return None
    raise _refuse(value, "None")


def _instance(declared: type) -> _Kind:
    noun = f"an instance of {declared.__name__}"

    def take(value: object) -> object:
        if isinstance(value, declared):
            return value
        raise _refuse(value, noun)

    return _Kind(noun, take)


def _collection(build: Callable[[Iterable[object]], object], entry: _Kind, bounds: Bounds) -> _Kind:
    noun = f"a list of {entry.plural}"

    def take(value: object) -> object:
        # anything with a length and an order, except strings and bytes, which are no lists of ids
        refused = isinstance(
            value, str | bytes | bytearray | memoryview | Mapping | set | frozenset
        )
        if refused or not isinstance(value, Collection):
            raise _refuse(value, noun)
        _check_length(value, bounds, noun)
        taken: list[object] = []
        for item in _entries(value, noun):
            try:
                taken.append(entry.take(item))
            except _Wrong as wrong:
                raise _Wrong(f"[{len(taken)}]{wrong}", is_inside=True) from None
        return build(taken)

    return _Kind(noun, take)


def _mapping(key: _Kind, entry: _Kind, bounds: Bounds) -> _Kind:
    noun = f"a mapping from {key.plural} to {entry.plural}"

    def take(value: object) -> object:
        if not isinstance(value, Mapping):
            raise _refuse(value, noun)
        _check_length(value, bounds, noun)
        taken = {}
        for name, item in _entries(_asked(operator.methodcaller("items"), value, noun), noun):
            try:
                name_taken = key.take(name)
            except _Wrong:
                raise _Wrong(
                    f" has the key {show(name)}; a key must be {key.noun}", is_inside=True
                ) from None
            try:
                taken[name_taken] = entry.take(item)
            except _Wrong as wrong:
                raise _Wrong(f"[{show(name)}]{wrong}", is_inside=True) from None
        return taken

    return _Kind(noun, take)


def _check_length(value: Collection[object], bounds: Bounds, noun: str) -> None:
    length = _asked(len, value, noun)
    if not bounds.hold(length):
        raise _Wrong(f" has {length} entries; it must have {bounds.count()}", is_inside=True)


def _asked(method: Callable[[Any], Any], value: object, noun: str) -> Any:
    """The answer of one of the value's own methods; a value whose method raises is refused.

    A class may have a method that does not work for every instance: an array without dimensions
    has `__len__`, and a range of 2⁶⁴ has one that overflows.
    """
    try:
        return method(value)
    except Exception:
        raise _refuse(value, noun) from None


def _entries(value: Iterable[Any], noun: str) -> Iterator[Any]:
    """The entries of a value; refused if its own iterator raises."""
    try:
        yield from value
    except Exception:
        raise _refuse(value, noun) from None


_SCALARS: dict[object, Callable[[Bounds], _Kind]] = {
    bool: _boolean,
    int: _integer,
    float: _real,
    str: _string,
}
