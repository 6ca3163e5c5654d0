"""A YAML document that remembers where each value stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ctl_merge.errors import RecipeError

_MAX_BYTES = 1_000_000  # real recipes have a few KB
_MAX_NODES = 100_000  # aliases expanded: a few lines of nested aliases can otherwise stand for billions of values
_MAX_DEPTH = 100
_MAX_DIGITS = 100  # Python refuses to print numbers of thousands of digits, as messages and manifests would

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C it is ten times as fast


@dataclass(frozen=True)
class Document:
    """The data of one YAML file, its text, and the line of each value."""

    name: str
    text: str
    data: Any
    _root: yaml.Node | None

    @classmethod
    def load(cls, path: Path) -> list[Document]:
        """Read a file, which may hold several. Raises RecipeError if it is missing, no text, no YAML, or abusive."""
        try:
            raw = path.read_bytes()[: _MAX_BYTES + 1]
        except OSError as error:
            raise RecipeError(f"the recipe {str(path)!r} cannot be read: {error.strerror or error}") from None
        if len(raw) > _MAX_BYTES:
            raise RecipeError(f"{path}: larger than {_MAX_BYTES:,} bytes, which is no recipe")
        try:
            return cls.parse(raw.decode("utf-8"), str(path))
        except UnicodeDecodeError as error:
            raise RecipeError(
                f"{path}: not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
            ) from None

    @classmethod
    def parse(cls, text: str, name: str = "recipe") -> list[Document]:
        """Read YAML text: at least one document. Raises RecipeError as `load` does."""
        try:
            _check_size(text, name)
            loader, guard = _Loader(text), _Guard(name)
            found = []
            while loader.check_node():
                root = loader.get_node()
                assert root is not None
                guard.visit(root, ())
                found.append(cls(name, text, loader.construct_document(root), root))
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = f", line {mark.line + 1}" if mark else ""
            reason = getattr(error, "problem", None) or str(error)
            reason += ": indent with spaces, not with tabs" if mark and _tab_at(text, mark) else ""
            raise RecipeError(f"{name}{place}: not a YAML recipe: {reason}") from None
        except (RecursionError, ValueError) as error:
            raise RecipeError(f"{name}: not a YAML recipe: {error}") from None
        except (AttributeError, LookupError, ArithmeticError) as error:  # values that do not fit their tag: `!!bool x`
            raise RecipeError(f"{name}: not a YAML recipe: a value is not of its type ({error})") from None
        found = [document for document in found if document.data is not None] or found[:1]  # `---` at the end
        return found or [cls(name, text, None, None)]

    def line(self, path: Sequence[str | int]) -> int:
        """The line (from 1) of the value at `path`, or of the deepest part of the path that exists."""
        node, line = self._root, 1
        for step in path:
            child = None
            if isinstance(node, yaml.MappingNode):
                for key, value in node.value:
                    if key.value == str(step):
                        line, child = key.start_mark.line + 1, value
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
                child = node.value[step]
                line = child.start_mark.line + 1
            if child is None:
                break
            node = child
        return line


def _tab_at(text: str, mark: yaml.Mark) -> bool:
    """Whether what YAML stumbles over is a tab."""
    lines = text.splitlines()
    return mark.line < len(lines) and lines[mark.line][mark.column : mark.column + 1] == "\t"


def _check_size(text: str, name: str) -> None:
    """Refuse what is too large or too deep before anything is built from it: a parser's events cost little."""
    count = depth = 0
    for event in yaml.parse(text, _Loader):
        count += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if count > _MAX_NODES:
            raise RecipeError(f"{name}: more than {_MAX_NODES:,} values: shorten it")
        if depth > _MAX_DEPTH:
            raise RecipeError(f"{name}: the YAML expands without end (aliases or nesting): write it out plainly")


class _Guard:
    """Walks the node graph before anything is built from it: duplicate keys, recursion, explosion of aliases."""

    def __init__(self, name: str) -> None:
        self.name, self.seen = name, 0

    def visit(self, node: yaml.Node, above: tuple[int, ...]) -> None:
        self.seen += 1
        if self.seen > _MAX_NODES:
            raise RecipeError(f"{self.name}: more than {_MAX_NODES:,} values, with aliases written out: shorten it")
        if id(node) in above or len(above) > _MAX_DEPTH:
            raise RecipeError(f"{self.name}: the YAML expands without end (aliases or nesting): write it out plainly")
        above = (*above, id(node))
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":int") and len(node.value) > _MAX_DIGITS:
            raise RecipeError(f"{self.name}, line {node.start_mark.line + 1}: a number of {len(node.value):,} digits")
        if isinstance(node, yaml.SequenceNode):
            for child in node.value:
                self.visit(child, above)
        elif isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode):
                    raise RecipeError(f"{self.name}, line {line}: a key is a word, not a list or a mapping")
                if key.value in keys:
                    raise RecipeError(f"{self.name}, line {line}: {key.value!r} is given twice")
                keys.add(key.value)
                self.visit(key, above)
                self.visit(value, above)
