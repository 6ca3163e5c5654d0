"""What a recipe says of vocabulary, tokenizer and chat template."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ctl_merge.chat_template import TEMPLATES, is_literal
from ctl_merge.problems import Place, Problems
from ctl_merge.reference import ModelRef

MODEL: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "object"}, {"type": "null"}]}


class ModelTokenSchema(BaseModel):
    """The row of one token of one model."""

    model_config = ConfigDict(extra="forbid", strict=True)
    kind: Literal["model_token"]
    model: Any = Field(description="a model of the recipe", json_schema_extra=MODEL)
    token: str | None = Field(None, description="the token, as the model's tokenizer writes it")
    token_id: int | None = Field(None, ge=0, description="its id, instead of `token`")


class ZeroSchema(BaseModel):
    """A row of zeros."""

    model_config = ConfigDict(extra="forbid", strict=True)
    kind: Literal["zero"]


class TokenSchema(BaseModel):
    """What stands in for a token's row in models that lack the token."""

    model_config = ConfigDict(extra="forbid", strict=True)
    source: Any = Field(
        None, description="a model, {kind: model_token, model, token or token_id}, or {kind: zero}",
        json_schema_extra={
            "anyOf": [*MODEL["anyOf"], ModelTokenSchema.model_json_schema(), ZeroSchema.model_json_schema()]
        },
    )  # fmt: skip
    force: bool = Field(False, description="in models that have the token, too")


class TokenizerSchema(BaseModel):
    """The vocabulary of the merge."""

    model_config = ConfigDict(extra="forbid", strict=True)
    source: Any = Field("union", description="`base`, `union` or a model", json_schema_extra=MODEL)
    tokens: dict[str, TokenSchema] | None = Field(None, description="sources of single tokens' rows")
    pad_to_multiple_of: int | None = Field(
        None, ge=1, le=65_536, description="rows are the tokens, rounded up to a multiple"
    )


@dataclass(frozen=True)
class TokenSetting:
    """Where the row of one token comes from: a token or id of a model, zeros, or (None) as for any other token."""

    model: ModelRef | None = None
    token: str | int | None = None  # None: the same token
    zero: bool = False
    force: bool = False

    @property
    def default(self) -> bool:
        return self.model is None and not self.zero


@dataclass(frozen=True)
class TokenizerSetting:
    """`source` None: all models must have the same vocabulary."""

    source: Literal["base", "union"] | ModelRef | None = None
    tokens: Mapping[str, TokenSetting] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    chat_template: str | None = None  # `auto`, or a template itself


class TokenizerChecker:
    """Turns the recipe's keys into a setting; `ref` parses a model, `problems` gets what is wrong, with its place.

    `models` are those that the recipe merges, None where they are not known for problems of their own.
    """

    def __init__(
        self, ref: Callable[[Place, Any], ModelRef | None], models: Iterable[ModelRef] | None, problems: Problems
    ) -> None:  # fmt: skip
        self._parse, self.problems = ref, problems
        self.models = None if models is None else list(models)

    def setting(self, data: Mapping[str, Any]) -> TokenizerSetting:
        short, long = data.get("tokenizer_source"), data.get("tokenizer")
        if short is not None and long is not None:
            self.problems.append((("tokenizer",), "`tokenizer` and `tokenizer_source` say the same: keep one"))
        own: Mapping[str, Any] = long if isinstance(long, dict) else {}
        source = self._source(("tokenizer_source",), short) if short is not None else None
        if isinstance(long, dict):
            source = self._source(("tokenizer", "source"), own.get("source") or "union")
        tokens = own.get("tokens")
        listed = tokens.items() if isinstance(tokens, dict) else ()
        return TokenizerSetting(
            source=source, tokens={t: self._token(t, raw) for t, raw in listed if isinstance(raw, dict)},
            pad_to_multiple_of=own.get("pad_to_multiple_of"), chat_template=self._template(data.get("chat_template")),
        )  # fmt: skip

    def _source(self, path: Place, raw: Any) -> Literal["base", "union"] | ModelRef | None:
        return raw if raw in ("base", "union") else self._ref(path, raw)

    def _ref(self, path: Place, raw: Any, among: Iterable[ModelRef] | None = None) -> ModelRef | None:
        before = len(self.problems)
        if isinstance(raw, dict) and not raw.keys() <= {"model", "path", "revision"}:
            unknown = ", ".join(sorted(map(str, raw.keys() - {"model", "path", "revision"})))
            self.problems.append((path, f"unknown key {unknown} of a model; there are: path, revision"))
        found = self._parse(path, raw) if isinstance(raw, str | dict) else None
        if found is None and len(self.problems) == before:
            told = "`base`, `union` or " if among is None else ""
            self.problems.append((path, f"{told}a model is due here, as org/name or a folder (it is {raw!r})"))
        if found is not None and among is not None and found not in among:
            listed = ", ".join(map(str, among))
            self.problems.append((path, f"{found} is not a model of this recipe; there are: {listed}"))
        return found

    def _token(self, token: str, raw: Mapping[str, Any]) -> TokenSetting:
        path, source, force = ("tokenizer", "tokens", token, "source"), raw.get("source"), raw.get("force") is True
        if source is None:
            return TokenSetting(force=force)
        if not isinstance(source, dict) or "kind" not in source:
            return TokenSetting(model=self._ref(path, source, self.models), force=force)
        kind = source["kind"]
        if kind not in ("zero", "model_token"):
            self.problems.append(((*path, "kind"), f"`kind` is `zero` or `model_token`, not {kind!r}"))
            return TokenSetting()
        schema = ZeroSchema if kind == "zero" else ModelTokenSchema
        try:
            TypeAdapter(schema).validate_python(source)
        except ValidationError as error:
            self.problems += [((*path, *e["loc"]), _message(e, schema)) for e in error.errors()]
            return TokenSetting()
        if kind == "zero":
            return TokenSetting(zero=True, force=force)
        given = [source[key] for key in ("token", "token_id") if source.get(key) is not None]
        if len(given) != 1:
            self.problems.append((path, "`model_token` takes one of `token` and `token_id`"))
            return TokenSetting()
        return TokenSetting(self._ref((*path, "model"), source["model"], self.models), given[0], force=force)

    def _template(self, raw: Any) -> str | None:
        if not isinstance(raw, str) or raw == "auto":
            return raw if isinstance(raw, str) else None
        if not is_literal(raw):
            if raw not in TEMPLATES:
                known = ", ".join(["auto", *TEMPLATES])
                told = f"no chat template {raw!r}; there are: {known}; or write the template itself, in jinja"
                self.problems.append((("chat_template",), told))
            return TEMPLATES.get(raw)
        problem = _jinja_problem(raw)
        if problem:
            self.problems.append((("chat_template",), f"the chat template is not jinja: {problem}"))
        return raw


def schema_problem(path: Place, kind: str, message: str, value: Any) -> str:
    """What a problem of the schema below `tokenizer` is called."""
    schema: type[BaseModel] = TokenSchema if path[1:2] == ("tokens",) else TokenizerSchema
    return _message({"loc": path, "type": kind, "msg": message, "input": value}, schema)


def _message(error: Any, schema: type[BaseModel]) -> str:
    name = str(error["loc"][-1]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        return f"unknown key {name!r}; there are: {', '.join(schema.model_fields)}"
    if error["type"] == "missing":
        return f"`{name}` is missing"
    if error["type"] == "model_type":
        return f"`{name}` is a mapping with {', '.join(schema.model_fields)} (it is {error['input']!r})"
    return f"`{name}`: {error['msg'][:1].lower()}{error['msg'][1:]} (it is {error['input']!r})"


def _jinja_problem(text: str) -> str | None:
    """What keeps a template from being read, with its line; None where nothing does."""
    from jinja2 import Environment, TemplateSyntaxError

    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)  # transformers' own tag
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except TemplateSyntaxError as error:
        return f"{error.message} (its line {error.lineno})"
    return None
