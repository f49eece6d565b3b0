"""What each key of a config means: the comments beside the fields of `schema`, read from its source."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import tokenize
import typing

from z1_jax.config import schema
from z1_jax.config.schema import Config


def meanings() -> dict[str, str]:
    """The comments above and beside each key's field, by its dotted key; empty without the source."""
    try:
        source = inspect.getsource(schema)
    except OSError:
        return {}
    return _of(Config, "", _fields(source))


def sections() -> dict[str, str]:
    """What each section is, by its name."""
    hints = typing.get_type_hints(Config)
    kinds = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    return {name: " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split()) for name, kind in kinds.items()}


def _of(cls: type, prefix: str, fields: dict[tuple[str, str], str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            found |= _of(typing.cast(type, kind), f"{prefix}{name}.", fields)
            continue
        texts = (fields.get((base.__name__, name)) for base in cls.__mro__)
        found[prefix + name] = next(filter(None, texts), "")
    return found


def _fields(source: str) -> dict[tuple[str, str], str]:
    """The comments above a field, then that at the end of its lines, by (class, field)."""
    comments, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.removeprefix("#").strip()
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    found = {}
    for cls in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for node in cls.body:
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            last = node.end_lineno or node.lineno
            lines = [*range(first, node.lineno), last]
            found[cls.name, node.target.id] = " ".join(comments[line] for line in lines if line in comments)
    return found
