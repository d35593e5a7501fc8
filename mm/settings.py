"""What every config section is made of: strict fields, readable numbers, and kinds.

A *section* is the typed config of one part and stands beside the code that it configures. A *kind* is a name in a plain
dict, `name -> "module:Class"`, imported when it is used; `kind: my_package.my_module:MyConfig` names a class of the
user's own, so that a part can be added without touching this framework.

Sections import no torch: checking a config works where torch is broken or absent.
"""

import difflib
import importlib
import re
from collections.abc import Iterable
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError, core_schema

UNITS = {"": 1.0, "%": 1e-2, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
NUMBER = re.compile(r"\s*([-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([%kKMGBT]?)\s*")


class Loader(yaml.SafeLoader):
    """Of YAML in which `1e-6` is a number, as in YAML 1.2; 1.1 wants `1.0e-6`."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_number(value: Any) -> Any:
    """`5e-5`, `1M`, `3%`, `4_096` to a number; anything that is not such a string is handed on unchanged.

    Units are decimal (1M = 10^6), as the field counts tokens.
    """
    if isinstance(value, str) and (match := NUMBER.fullmatch(value)):
        number = float(match[1].replace("_", "")) * UNITS[match[2]]
        number = float(f"{number:.15g}")  # 3 * 0.01 is 0.03, not 0.030000000000000002's neighbour
        return int(number) if number.is_integer() else number
    return value


NUMBER_TEXT = {"type": "string", "pattern": r"^[-+]?[\d_.]+([eE][-+]?\d+)?[%kKMGBT]?$"}
Count = Annotated[int, BeforeValidator(parse_number), WithJsonSchema({"anyOf": [{"type": "integer"}, NUMBER_TEXT]})]
Number = Annotated[float, BeforeValidator(parse_number), WithJsonSchema({"anyOf": [{"type": "number"}, NUMBER_TEXT]})]


def _is_a_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_is_a_pattern)]
"""A regular expression for whole names of parameters or modules, such as `vision.*`."""


def nearest(name: str, names: Iterable[str]) -> str:
    """` (did you mean 'x'?)` or the list of what there is, for the end of an error line."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"expected one of: {', '.join(names)}"


def merge(base: Any, over: Any) -> Any:
    """`over` on top of `base`: mappings merge; another `kind`, a list or a plain value replaces."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    if "kind" in over and over["kind"] != base.get("kind", over["kind"]):
        return over
    return {key: merge(base.get(key), over[key]) if key in over else base[key] for key in {**base, **over}}


class Section(BaseModel):
    """A part of a config. Unknown keys are errors that name the nearest valid one."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _knows_every_key(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for key in value:
                if key not in cls.model_fields:
                    raise PydanticCustomError(
                        "unknown_key",
                        "unknown key; {hint}",
                        {"key": str(key), "hint": nearest(str(key), cls.model_fields)},
                    )
        return value


class KindSection(Section):
    """A section that is one of several kinds; `kind` says which."""

    kind: str


class Kinds:
    """The kinds of one part: `Annotated[Any, Kinds("optimizer", {"adamw": "mm.train.optim:AdamWConfig"})]`."""

    def __init__(self, what: str, names: dict[str, str], default: str | None = None) -> None:
        self.what = what
        self.names = names
        self.default = default

    def resolve(self, kind: str) -> type[KindSection]:
        """The config class of a kind's name or of an import path `package.module:Class`."""
        target = self.names.get(kind, kind)
        if ":" not in target:
            raise ValueError(f"unknown {self.what} kind {kind!r}; {nearest(kind, self.names)}")
        module, _, name = target.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{self.what} kind {kind!r} cannot be imported: {error}") from error
        if not (isinstance(found, type) and issubclass(found, KindSection)):
            raise ValueError(f"{self.what} kind {kind!r} is not a subclass of mm.settings.KindSection")
        return found

    def _validate(self, value: Any) -> KindSection:
        if isinstance(value, KindSection):
            return value
        if not isinstance(value, dict):
            raise ValueError(f"expected a mapping with a `kind`; kinds: {', '.join(self.names)}")
        kind = value.get("kind", self.default)
        if kind is None:
            raise ValueError(f"`kind` is missing; one of: {', '.join(self.names)}")
        return self.resolve(str(kind)).model_validate(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda section: section.model_dump(mode="json")
            ),
        )

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        known = [
            {
                "allOf": [
                    handler(self.resolve(name).__pydantic_core_schema__),
                    {"properties": {"kind": {"const": name}}},
                ]
            }
            for name in self.names
        ]
        own = {"type": "object", "properties": {"kind": {"type": "string", "pattern": r"^[\w.]+:\w+$"}}}
        required = [] if self.default else ["kind"]
        return {"type": "object", "required": required, "anyOf": [*known, own]}
