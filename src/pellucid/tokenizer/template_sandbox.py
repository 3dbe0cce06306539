"""Jinja for untrusted templates: what they may access, and how much they may build.

Jinja's own sandbox forbids private attributes. This one allows only listed methods and filters:
those that chat templates use.

Every statement, call, operator, filter and literal spends from one allowance, in units of about a
byte, and every value is checked for size and depth. So the usual runaways (an endless loop, a text
doubled again and again) get a clear error, at the same point on every machine. A single call in C,
such as a search or a sort of long values, is not bounded here: the process that renders
(`template_process.py`) has limits on time and memory for that.

Filters, functions and white space are those of transformers' chat templates, so a template gives
the same text. Filters that no chat template uses are left out. Marked texts (`traced_text.py`) keep
their marks through every operation (`provenance.py`). Reference: jinja2.sandbox. This module does
not know the structure of messages.
"""

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from types import BuiltinMethodType, CodeType
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Cycler, Joiner, Namespace, pass_context
from markupsafe import Markup

from .provenance import (
    ForeignMarkup,
    as_text,
    joined,
    of_filter,
    of_method,
    of_operator,
    percent,
    replaced,
    traced_format,
)
from .traced_text import whole

__all__ = ["LimitError", "RefusedError", "compile_template", "parse_template", "render_template"]

MAX_VALUE = 1 << 23  # characters or elements of one value, nested ones included
MAX_SPENT = 1 << 25  # of one rendering: a character or a step costs 1, an element ELEMENT
ELEMENT = 8
MAX_NESTING = 128  # values within values
MAX_INT_BITS = 4096
MAX_INDENT = 32
MAX_DATE_FORMAT = 256  # characters

_TEXT_METHODS = (
    "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit "
    "isidentifier islower isnumeric isspace "
    "istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex "
    "rpartition rsplit rstrip split "
    "splitlines startswith strip swapcase title upper"
)
_METHODS: Mapping[type, frozenset[str]] = {
    str: frozenset(_TEXT_METHODS.split()),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
}
_FILTERS = (
    "abs capitalize count d default dictsort e escape first float forceescape format groupby "
    "indent int items join last length list lower map max min reject rejectattr replace reverse "
    "safe select selectattr sort string title tojson trim unique upper wordcount"
)
# filters that make a text from a text
_TEXT_FILTERS = "capitalize e escape forceescape indent lower safe string title trim upper"


class LimitError(Exception):
    """A template exceeds a limit; the message is a clause about it."""


class RefusedError(Exception):
    """A template called `raise_exception`; the message is the template's."""


def parse_template(source: str) -> nodes.Template:
    """The syntax tree of `source`. Raises TemplateSyntaxError."""
    return _Environment().parse(source)


def compile_template(tree: nodes.Template) -> CodeType:
    """Python code for a template. Raises what Jinja raises: TemplateAssertionError for a filter or
    test that does not exist, RecursionError for too deep nesting.
    """
    code: CodeType = _Environment().compile(tree)
    return code


def render_template(code: CodeType, variables: Mapping[str, Any]) -> str:
    """The text that a compiled template makes from `variables`, which must be plain data. It keeps
    the marks of `TracedText`.

    Raises LimitError, RefusedError, and any other exception of the template.
    """
    environment = _Environment()  # one per rendering: it holds the allowance
    template = Template.from_code(environment, code, environment.globals)
    parts = list(template.root_render_func(template.new_context(dict(variables))))
    environment.room_for(sum(map(len, parts)))
    return joined(parts)


class _CodeGenerator(CodeGenerator):
    """Jinja's compiler. Each statement, and each expression that makes a value, calls the
    environment, which charges the allowance.
    """

    def blockvisit(self, nodes_: Iterable[nodes.Node], frame: Frame) -> None:
        for node in nodes_:
            parts = node.nodes if isinstance(node, nodes.Output) else []
            text = sum(len(part.data) for part in parts if isinstance(part, nodes.TemplateData))
            self.writeline(f"environment.spend({1 + text})")
            super().blockvisit([node], frame)
        super().blockvisit([], frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concatenated(")
        self.visit_Tuple(nodes.Tuple(node.nodes, "load"), frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._made(lambda: super(_CodeGenerator, self).visit_Tuple(node, frame))
        else:
            super().visit_Tuple(node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._made(lambda: super(_CodeGenerator, self).visit_List(node, frame))

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._made(lambda: super(_CodeGenerator, self).visit_Dict(node, frame))

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        self._made(lambda: super(_CodeGenerator, self).visit_Compare(node, frame))

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        self._made(lambda: super(_CodeGenerator, self).visit_Getitem(node, frame))

    def _made(self, visit: Callable[[], None]) -> None:
        self.write("environment.made(")
        visit()
        self.write(")")


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training. It has no effect here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(
            parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
        )


class _Namespace(Namespace):
    """A namespace. It may hold itself, so its text does not show its values."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Environment(ImmutableSandboxedEnvironment):
    """What one rendering may access, and what is left of its allowance."""

    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)
    concat = staticmethod(joined)  # joins the output of a macro or a block

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            optimized=False,
            finalize=_finalize,
            cache_size=0,
        )
        # the allowance
        self._spent = 0
        # (object, weight, depth) by id(); the object is held so that its id is not reused
        self._weighed: dict[int, tuple[object, int, int]] = {}
        # the filters: some are our own, those that make texts keep marks, and all are bounded
        given = self.filters
        own = {
            "format": _format,
            "indent": self._bounded_indent(given["indent"]),
            "join": self._bounded_join(given["join"]),
            "replace": self._bounded_replace(given["replace"]),
            "tojson": self._tojson,
        }
        own |= {name: _traced(name, own.get(name, given[name])) for name in _TEXT_FILTERS.split()}
        self.filters = {
            name: self._watched(own.get(name, given[name])) for name in _FILTERS.split()
        }
        # the functions
        self.globals = {
            "range": self.globals["range"],
            "dict": _dict,
            "namespace": _Namespace,
            "cycler": Cycler,
            "joiner": Joiner,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    # ---- the allowance

    def spend(self, units: int) -> None:
        """Take from the allowance."""
        self._spent += units
        if self._spent > MAX_SPENT:
            raise LimitError(f"it makes more than {MAX_SPENT} characters and steps")

    def room_for(self, size: int) -> None:
        """Refuse a value of this size before it is built."""
        if size > MAX_VALUE:
            raise LimitError(f"it makes a value of more than {MAX_VALUE} characters or elements")

    def weigh(self, value: Any) -> int:
        """Characters and elements of a value. A part that it holds twice counts twice."""
        return self._measure(value)[0]

    def _measure(self, value: Any) -> tuple[int, int]:
        """(weight, depth). Iterators and functions weigh 1; an iterator's values are weighed when
        it yields them.
        """
        if isinstance(value, str):
            return len(value), 0
        if isinstance(value, int):
            if (bits := value.bit_length()) > MAX_INT_BITS:
                raise LimitError(f"it makes a number of more than {MAX_INT_BITS} bits")
            return 1 + bits // 8, 0
        if not isinstance(value, list | tuple | dict):
            return 1, 0
        if (known := self._weighed.get(id(value))) is not None:
            return known[1:]
        weight, depth = 1, 0
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            of_part = self._measure(part)
            weight, depth = weight + 1 + of_part[0], max(depth, of_part[1])
        self.room_for(weight)
        if depth >= MAX_NESTING:
            raise LimitError(f"it nests values more than {MAX_NESTING} deep")
        self._weighed[id(value)] = (value, weight, depth + 1)
        return weight, depth + 1

    def made(self, value: Any) -> Any:
        """Check a new value, charge it to the allowance, and return it."""
        self.room_for(self.weigh(value))
        size = len(value) if isinstance(value, str) else 0
        if isinstance(value, list | tuple | dict):
            size = ELEMENT * len(value)
        self.spend(1 + size)
        return value

    def concatenated(self, values: tuple[Any, ...]) -> str:
        """The operator `~`."""
        self.room_for(sum(map(self.weigh, values)))
        text: str = self.made(joined(map(as_text, values)))
        return text

    # ---- called by Jinja

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, Namespace | Cycler | Joiner | Macro):
            return super().is_safe_attribute(obj, attr, value)
        if type(obj).__name__ == "LoopContext":
            return not attr.startswith("_")
        return any(isinstance(obj, kind) and attr in names for kind, names in _METHODS.items())

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`"{}".format` without widths, which make long texts from short ones."""
        if (
            super().wrap_str_format(value) is None
            or ":" in value.__self__
            or isinstance(value.__self__, Markup)
        ):
            return None
        traced = traced_format(SandboxedFormatter, self)

        def bounded(*args: Any, **kwargs: Any) -> str:
            self.room_for(
                len(value.__self__)
                + value.__self__.count("{") * self.weigh([*args, *kwargs.values()])
            )
            return traced(value.__self__, args, kwargs)

        return bounded

    def call(self, context: Context, method: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(method, BuiltinMethodType) and isinstance(method.__self__, str):
            if method.__name__ == "replace":
                self.room_for(_replaced_length(method.__self__, *args))
            elif method.__name__ == "join":
                args = (self._joinable(*args, between=method.__self__),)
            return self.made(
                of_method(method, args, kwargs, super().call(context, method, *args, **kwargs))
            )
        result = super().call(context, method, *args, **kwargs)
        return self.made(ForeignMarkup(result) if isinstance(result, Markup) else result)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(times, int):
                    self.room_for((1 + self.weigh(value)) * times)
        elif (
            operator == "**"
            and isinstance(left, int)
            and isinstance(right, int)
            and left.bit_length() * right > MAX_INT_BITS
        ):
            raise LimitError(f"it makes a number of more than {MAX_INT_BITS} bits")
        elif operator == "%" and isinstance(left, str):
            return self.made(percent(left, right))
        elif operator == "+":
            self.room_for(self.weigh(left) + self.weigh(right))
        return self.made(
            of_operator(operator, left, right, super().call_binop(context, operator, left, right))
        )

    # ---- filters

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose arguments and result are weighed. The arguments that Jinja adds (context,
        environment) weigh 1.
        """

        @functools.wraps(function)  # keeps Jinja's marks, which say which filters take the context
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.room_for(sum(map(self.weigh, args)))
            return self.made(function(*args, **kwargs))

        return watched

    def _bounded_join(self, join: Callable[..., str]) -> Callable[..., str]:
        @functools.wraps(join)
        def bounded(eval_ctx: Any, value: Any, d: str = "", attribute: Any = None) -> str:
            if attribute is not None:
                value = map(make_attrgetter(self, attribute), value)
            return joined(map(as_text, self._joinable(value, between=str(d))), as_text(d))

        return bounded

    def _joinable(self, values: Iterable[Any], *, between: str) -> list[Any]:
        listed = list(values)
        self.room_for(self.weigh(listed) + len(between) * len(listed))
        return listed

    def _bounded_replace(self, replace: Callable[..., str]) -> Callable[..., str]:
        @functools.wraps(replace)
        def bounded(eval_ctx: Any, s: Any, old: str, new: str, count: int | None = None) -> str:
            text, old, new = map(as_text, (s, old, new))
            self.room_for(_replaced_length(text, old, new))
            return replaced(text, old, new, -1 if count is None else count)

        return bounded

    def _bounded_indent(self, indent: Callable[..., str]) -> Callable[..., str]:
        @functools.wraps(indent)
        def bounded(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
            columns = len(width) if isinstance(width, str) else width
            self.room_for(len(s) + (1 + s.count("\n")) * columns)
            return indent(s, width, first, blank)

        return bounded

    def _tojson(
        self,
        x: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        columns = len(indent) if isinstance(indent, str) else indent or 0
        if columns > MAX_INDENT:
            raise LimitError(
                f"it indents JSON by {columns}; at most {MAX_INDENT} columns are allowed"
            )
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        parts: list[str] = []
        for part in encoder.iterencode(x):
            self.spend(len(part))
            parts.append(part)
        return whole("".join(parts))


@pass_context
def _finalize(context: Context, value: Any) -> str:
    """The text of a value that a template writes out. It takes the context, so Jinja does not call
    it during compilation.
    """
    environment = context.environment
    assert isinstance(environment, _Environment)
    environment.room_for(environment.weigh(value))
    text = as_text(value)
    environment.spend(len(text))
    return text


def _traced(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that makes a text from a text, with marks."""

    @functools.wraps(function)
    def traced(value: Any, *args: Any, **kwargs: Any) -> Any:
        return of_filter(name, value, (*args, *kwargs.values()), function(value, *args, **kwargs))

    return traced


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    return percent(as_text(value), kwargs or args)


def _replaced_length(text: str, old: str, new: str, count: int = -1) -> int:
    return len(text) + text.count(old) * max(0, len(new) - len(old))


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """`dict(a=1)`, as a function, so that a template cannot reach the methods of the type."""
    return dict(*args, **kwargs)


def _raise_exception(message: object) -> NoReturn:
    raise RefusedError(str(message)[:1000])


def _strftime_now(format: str) -> str:
    if len(format) > MAX_DATE_FORMAT:
        raise LimitError(f"it formats a date with more than {MAX_DATE_FORMAT} characters")
    text = datetime.now().strftime(format)
    return text if type(format) is str else whole(text)
