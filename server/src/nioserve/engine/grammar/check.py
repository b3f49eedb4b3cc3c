"""Whether a grammar can be used, asked by API workers before a request is sent to the engine.

There are short schemas that take hours to compile, such as an intersection of patterns, and a thread that compiles
cannot be stopped. So it is tried in a process of its own, with bounds on its time and memory, for a tokeniser of bytes.
What passes here compiles as fast in the engine.

Run as `python -m nioserve.engine.grammar.check`: the grammar on standard input, what is wrong with it on output.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from functools import lru_cache

from nioserve.engine.grammar.source import GrammarError, build, translate
from nioserve.engine.messages import Grammar

CPU_SECONDS = 2
_WALL_SECONDS = 15
_MEMORY_BYTES = 1 << 30
_TOO_COMPLEX = f"it is too complex: it takes more than {CPU_SECONDS} seconds to compile"


def check(grammar: Grammar) -> None:
    """Raise GrammarError, a ValueError, when a grammar is invalid, not supported or takes too long to compile.

    Takes 0.2 s for a grammar not seen lately, and 15 s at worst: call it from a thread.
    """
    problem = _problem(grammar.kind, grammar.source)
    if problem:
        raise GrammarError(problem)


@lru_cache(maxsize=128)
def _problem(kind: str, source: str) -> str:
    """Return what is wrong; nothing for a grammar that is fine."""
    try:
        text = translate(Grammar(kind, source))
    except GrammarError as error:
        return str(error)
    if kind == "json_object":
        return ""
    command = [sys.executable, "-m", "nioserve.engine.grammar.check"]
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=_WALL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return _TOO_COMPLEX
    return done.stdout.decode().strip() if done.returncode == 0 else _TOO_COMPLEX


def main() -> None:
    """Compile one grammar within the bounds, or be killed."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    from llguidance import LLTokenizer

    try:
        build(sys.stdin.buffer.read().decode(), LLTokenizer("byte"))
    except GrammarError as error:
        sys.stdout.write(str(error))


if __name__ == "__main__":
    main()
