"""Chat templates that try to crash, freeze or fill the process, by name; and a program that renders
them all and tells what each did.

    python tests/unit/hostile_templates.py CPU_SECONDS

prints a line of JSON for each template: its name, the outcome, the seconds of CPU time here, the
growth of the peak of memory so far here, the peak in the processes that render, and the longest CPU
time here in which no signal was handled. Memory is in MB.
"""

import json
import resource
import signal
import sys
import time

__all__ = ["HOSTILE", "main"]

LONG = "A" * 1000


def loops(body: str = "") -> str:
    """A body that is run 10^15 times."""
    return "{% for i in range(99999) %}" * 3 + body + "{% endfor %}" * 3


def grow(start: str, step: str, *, end: str = "{{ n.x }}", times: int = 99) -> str:
    """A value `n.x` that is replaced by `step` again and again."""
    return (
        f"{{% set n = namespace(x={start}) %}}"
        f"{{% for i in range({times}) %}}{{% set n.x = {step} %}}{{% endfor %}}{end}"
    )


def deep(step: str, end: str, start: str = "()") -> str:
    """A value that is nested 900,000 deep, and what is then done with it."""
    loop = "{% for i in range(9) %}{% for j in range(99999) %}"
    return (
        f"{{% set n = namespace(x={start}) %}}{loop}{{% set n.x = {step} %}}"
        f"{{% endfor %}}{{% endfor %}}{end}"
    )


MANY = "(('a' * 10 ** 6) | list)"
PAIRS = "{% set hole = 2 ** 61 - 1 %}{% set n = namespace(x=[]) %}"
TEXT = "('a' * 4000000)"

HOSTILE = {
    # loops and recursion
    "loops": loops(),
    "loops that write": loops(LONG),
    "loops in a macro": "{% macro m() %}" + loops(LONG) + "{% endmacro %}{{ m() }}",
    "loops in a block": "{% set x %}" + loops(LONG) + "{% endset %}",
    "loops in a filter": "{% filter upper %}" + loops(LONG) + "{% endfilter %}",
    "loops in a call": "{% macro m() %}{{ caller() }}{% endmacro %}{% call m() %}"
    + loops(LONG)
    + "{% endcall %}",
    "a loop that continues": "{% for i in range(99999) %}" * 3
    + "{% continue %}"
    + "{% endfor %}" * 3,
    "a range without end": "{{ range(10 ** 18) | list | length }}",
    "a range that is summed up": "{{ range(10 ** 5) | map('string') | join | length }}" * 200,
    "recursion": "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(99) }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursion by caller": "{% macro f() %}{% call f() %}{{ caller() }}{% endcall %}{% endmacro %}"
    "{% call f() %}x{% endcall %}",
    "recursive loop": "{% for x in range(9) recursive %}"
    "{{ loop(range(9)) if loop.depth < 99 }}{% endfor %}",
    "a recursive loop over itself": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "loop.cycle": loops("{{ loop.cycle(" + "'a'," * 99 + ") }}"),
    "loop.nextitem": loops("{{ loop.nextitem }}{{ loop.changed(i) }}"),
    # values that double
    "text doubled by ~": grow("'ab'", "n.x ~ n.x"),
    "text doubled by +": grow("'ab'", "n.x + n.x"),
    "text doubled by join": grow("'ab'", "[n.x, n.x] | join"),
    "text doubled by replace": grow("'ab'", "n.x.replace('a', 'aa').replace('b', 'bb')"),
    "text doubled by format": grow("'ab'", "'{0}{0}'.format(n.x)"),
    "text doubled by %": grow("'ab'", "'%s%s' % (n.x, n.x)"),
    "text doubled by a format filter": grow("'ab'", "'%s%s' | format(n.x, n.x)"),
    "text doubled by a macro": "{% macro t(x) %}{{ x }}{{ x }}{% endmacro %}"
    + grow("'ab'", "t(n.x)"),
    "text doubled by repr": grow("'\\\\'", "[n.x] | string"),
    "text doubled by JSON": grow("'\\\\'", "n.x | tojson"),
    "text doubled by escape": grow("'&'", "n.x | forceescape | string"),
    "list doubled": grow("[1]", "n.x + n.x"),
    "list of lists": grow("[1]", "[n.x, n.x]"),
    "tuple of tuples": grow("(1,)", "(n.x, n.x)"),
    "mapping of mappings": grow("{}", "{1: n.x, 2: n.x}"),
    "dict of dicts": grow("{}", "dict(a=n.x, b=n.x)"),
    "number squared": grow("7", "n.x * n.x"),
    "long numbers in a list": "{{ ([7 ** 1400] * 4000000) | string | length }}",
    "long numbers as JSON": "{{ ([7 ** 1400] * 4000000) | tojson | length }}",
    # values that are large at once
    "a long prompt": "{{ '😀' * 4000000 }}" * 3,
    "text times": "{{ 'a' * 10 ** 12 }}",
    "list times": "{{ 10 ** 9 * [1] }}",
    "tuple times": "{{ (1, 2) * 10 ** 9 }}",
    "power": "{{ 7 ** (7 ** 7) }}",
    "power of a power": "{{ 2 ** 2 ** 2 ** 2 ** 2 ** 2 }}",
    "a long number as text": "{{ (7 ** 1400) | string | int ** 1000 }}",
    "a number out of a long text": "{{ ('9' * 4000000) | int }}",
    "a float out of a long text": "{{ ('9' * 4000000) | float }}",
    "replace": "{{ ('a' * 10 ** 6).replace('a', 'b' * 10 ** 6) }}",
    "replace nothing": "{{ ('a' * 10 ** 6).replace('', 'b' * 10 ** 6) }}",
    "replace filter": "{{ ('a' * 10 ** 6) | replace('a', 'b' * 10 ** 6) }}",
    "join": "{{ ('b' * 10 ** 6).join('a' * 10 ** 5) }}",
    "join filter": "{{ ('a' * 10 ** 5) | join('b' * 10 ** 6) }}",
    "indent": "{{ ('\n' * 10 ** 6) | indent(10 ** 6) }}",
    "indent by a text": "{{ ('\n' * 10 ** 6) | indent('x' * 10 ** 6) }}",
    "json": "{{ [1] | tojson(indent=10 ** 9) }}",
    "json between texts": "{{ ([1] * 10 ** 6) | tojson(separators=('x' * 10 ** 6, ':')) }}",
    "format with a width": "{{ '{:999999999}'.format(1) }}",
    "format with a width in an argument": "{{ '{:{}}'.format(1, 999999999) }}",
    "percent with a width": "{{ '%999999999d' % 1 }}",
    "percent with a width in an argument": "{{ '%*d' % (999999999, 1) }}",
    "percent with a precision": "{{ '%.999999999f' % 1 }}",
    "many widths": "{{ ('%999d' * 9000) | format(1) }}",
    "date": "{{ strftime_now('%999d' * 1200000) }}",
    "many dates": loops("{{ strftime_now('%999d' * 60) }}"),
    "ljust": "{{ 'a'.ljust(10 ** 9) }}",
    "center": "{{ 'a'.center(10 ** 9) }}",
    "zfill": "{{ 'a'.zfill(10 ** 9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10 ** 9) }}",
    "translate": "{{ 'a'.translate({97: 'b' * 10 ** 9}) }}",
    "bytes": "{{ (5).to_bytes(10 ** 9, 'big') }}",
    # one call that takes long
    "rfind": "{{ " + TEXT + ".rfind('ab' ~ 'a' * 1500000) }}",
    "rindex": "{{ " + TEXT + ".rindex('ab' ~ 'a' * 1500000) }}",
    "rsplit": "{{ " + TEXT + ".rsplit('ab' ~ 'a' * 1500000) }}",
    "rpartition": "{{ " + TEXT + ".rpartition('ab' ~ 'a' * 1500000) }}",
    "find": "{{ " + TEXT + ".find('a' * 1500000 ~ 'b') }}",
    "count": "{{ " + TEXT + ".count('a' * 1500000 ~ 'b') }}",
    "split": "{{ " + TEXT + ".split('a' * 1500000 ~ 'b') | length }}",
    "split into letters": "{{ " + TEXT + ".split('a') | length }}",
    "in": "{{ ('a' * 1500000 ~ 'b') in " + TEXT + " }}",
    "strip": "{% set far = '\U0001f600' * 2000000 %}{{ " + TEXT + ".strip(far ~ 'a') }}",
    "lstrip": "{% set far = 'é' * 2000000 %}{{ ('è' * 2000000).lstrip(far ~ 'è') }}",
    "trim": "{% set far = 'é' * 2000000 %}{{ ('è' * 2000000) | trim(far ~ 'è') }}",
    "splitlines": "{{ ('\n' * 4000000).splitlines() | length }}",
    "title": loops("{{ " + TEXT + ".title() | length }}"),
    "sort": "{{ " + MANY + " | sort | length }}",
    "sort by an attribute": "{{ " + MANY + " | sort(attribute='0.0.0') | length }}",
    "unique": "{{ range(99999) | map('string') | unique | list | length }}",
    "groupby": "{{ (('a' * 999999) | list) | groupby(0) | length }}",
    "dictsort": "{{ dict(['ab', 'cd'] * 500000) | dictsort }}",
    "dict of pairs": loops("{{ dict(['ab', 'cd'] * 500000) }}"),
    "min of many": loops("{{ " + MANY + " | min }}"),
    "search a list": "{% set l = ['a'] * 10 ** 5 %}" + loops("{% if 'b' in l %}{% endif %}"),
    "list.count": "{% set l = ['a' * 999] * 8000 %}" + loops("{{ l.count('a' * 998 ~ 'b') }}"),
    "words": "{{ ('a ' * 2000000) | wordcount }}",
    "colliding keys": PAIRS
    + "{% for i in range(99999) %}{% set n.x = n.x + [hole * i] %}{% endfor %}{{ n.x | unique }}",
    "compare": "{% set a = ['a' * 999] * 8000 %}{% set b = ['a' * 999] * 8000 %}"
    + loops("{{ a == b }}"),
    # depth
    "deep key": deep("(n.x,)", "{{ {n.x: 1} }}"),
    "deep keys of messages": deep("(n.x,)", "{{ messages[0][n.x] }}"),
    "deep equal": deep("(n.x,)", "{{ n.x == n.x }}{{ (n.x,) == ((n.x,),) }}"),
    "deep text": deep("[n.x]", "{{ n.x }}"),
    "deep repr": deep("[n.x]", "{{ '{!r}'.format(n.x) }}"),
    "deep json": deep("[n.x]", "{{ n.x | tojson }}"),
    "deep mapping": deep("{1: n.x}", "{{ n.x }}"),
    "deep dict": deep("dict(a=n.x)", "{{ n.x | string }}"),
    "deep copy": deep("[n.x]", "{{ n.x.copy() }}"),
    "deep sort": deep("[n.x]", "{{ [n.x, [n.x]] | sort }}"),
    "deep unique": deep("(n.x,)", "{{ [n.x, (n.x,)] | unique | list }}"),
    "deep namespaces": deep("namespace(x=n.x)", "{{ n.x }}"),
    "deep iterators": deep("n.x | map('upper')", "{{ n.x | list }}"),
    "deep iterators that are dropped": deep("n.x | map('upper')", "{% set n.x = 1 %}"),
    "deep methods": deep("[n.x].index", "{{ n.x }}{% set n.x = 1 %}"),
    "deep items": deep("{1: n.x}.items()", "{{ n.x }}", "{}"),
    "deep cyclers": deep("cycler(n.x)", "{{ n.x.next() }}"),
    "deep joiners": deep("joiner(n.x)", "{{ n.x() }}"),
    "a namespace in itself": "{% set n = namespace() %}{% set n.x = n %}{{ [n] }}{{ n.x.x }}",
    "a list in a namespace in itself": "{% set n = namespace() %}{% set n.x = [n] %}{{ n.x }}",
    "brackets": "{{ " + "[" * 60000 + "]" * 60000 + " }}",
    "operators": "{{ 1" + " + 1" * 60000 + " }}",
    "nots": "{{ " + "not " * 60000 + "1 }}",
    "attributes": "{{ messages" + ".a" * 60000 + " }}",
    "filters": "{{ 1" + " | abs" * 30000 + " }}",
    "blocks": "{% if 1 %}" * 20000 + "{% endif %}" * 20000,
    "elifs": "{% if 0 %}" + "{% elif 0 %}" * 18000 + "{% endif %}",
    # out of the sandbox
    "file": "{% include '/etc/hostname' %}",
    "module": "{% import 'os' as os %}",
    "parent": "{% extends '/etc/passwd' %}",
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "environment": "{{ self._TemplateReference__context.environment }}",
    "a generator's frame": "{{ (messages | map('upper')).gi_frame.f_back }}",
    "a format of an attribute": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "attributes by map": "{{ messages | map(attribute='__class__') | list }}",
    "a text that refuses to end": "{{ raise_exception('x' * 8000000) }}",
}


def peak(who: int) -> float:
    """The peak of memory in MB."""
    unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes or kilobytes
    return resource.getrusage(who).ru_maxrss / unit


def main(cpu_seconds: float) -> None:
    """Render all templates in this process, with a signal every 20 ms."""
    from pellucid.errors import PellucidError
    from pellucid.tokenizer.chat_template import ChatTemplate
    from pellucid.tokenizer.template_process import TemplateProcesses

    last, longest = time.process_time(), 0.0

    def handle(*_: object) -> None:
        nonlocal last, longest
        now = time.process_time()
        longest, last = max(longest, now - last), now

    signal.signal(signal.SIGALRM, handle)
    before = peak(resource.RUSAGE_SELF)  # that of the process which started this one, perhaps
    processes = TemplateProcesses(cpu_seconds=cpu_seconds)
    for name, source in HOSTILE.items():
        begin = last = time.process_time()
        longest = 0.0
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        try:
            template = ChatTemplate(source, {}, processes=processes)
            outcome = f"{len(template.render([{'role': 'user', 'content': 'x'}]))} characters"
        except PellucidError as error:
            outcome = f"{type(error).__name__}: {error}"
        signal.setitimer(signal.ITIMER_REAL, 0)
        told = {
            "name": name,
            "outcome": outcome,
            "seconds": time.process_time() - begin,
            "memory": peak(resource.RUSAGE_SELF) - before,
            "memory_of_processes": peak(resource.RUSAGE_CHILDREN),
            "without_signals": longest,
        }
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
