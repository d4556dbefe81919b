"""A section of which there are several kinds, each with keys of its own: an annotated union of them.

    EngineSection = Annotated[LocalSection | Fsdp2Section | Fsdp1Section, OneOf("strategy", what="How ...")]

The keys that `OneOf` names decide the kind. A key of another kind is refused, unless it has its default there: then it
has no effect, and is left out. So one key turns a file that holds every key to another kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

from hybridflow.config.sections.base import HERE, Section, either


@dataclass(frozen=True)
class OneOf:
    """How the kinds of a section are told apart.

    Args:
        keys: those that decide, the most general first. A key with words of its own (a ``Literal``) decides by its
            word, or means the first kind where it is not given; any other key decides by being given.
        what: the section, in a sentence.
    """

    keys: tuple[str, ...]
    what: str

    def __init__(self, *keys: str, what: str) -> None:
        object.__setattr__(self, "keys", keys)
        object.__setattr__(self, "what", what)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        kinds: dict[str, type[Section]] = {self.name(kind): kind for kind in get_args(source)}

        def of(values: Any) -> str | None:
            if isinstance(values, Section):
                return self.name(type(values))
            return self.name(self.pick(list(kinds.values()), values)) if isinstance(values, Mapping) else None

        def left_out(values: Any) -> Any:
            return self.without_idle(list(kinds.values()), values) if isinstance(values, Mapping) else values

        schema = core_schema.tagged_union_schema(
            {name: handler.generate_schema(kind) for name, kind in kinds.items()},
            discriminator=of,
            custom_error_type="section",
            custom_error_message="it must be a section, such as {key: value}",
        )
        return core_schema.no_info_before_validator_function(left_out, schema)

    def name(self, kind: type[Section]) -> str:
        """Returns the words that choose a kind, such as ``vllm server``."""
        said = [(key, words(kind.model_fields[key])) for key in self.keys if key in kind.model_fields]
        return " ".join("/".join(known) or key for key, known in said)

    def having(self, kinds: Sequence[type[Section]], key: str) -> str:
        """Describes the kinds that have a key; empty where all have it."""
        having = [self.name(kind) for kind in kinds if key in kind.model_fields]
        without = {self.name(kind).split()[0] for kind in kinds if key not in kind.model_fields}
        short = [name if (first := name.split()[0]) in without else first for name in having]
        return either(list(dict.fromkeys(short))) if without else ""

    def pick(self, kinds: Sequence[type[Section]], values: Mapping[str, Any]) -> type[Section]:
        """Returns the kind that these values ask for.

        Raises:
            ValueError: a word that no kind has.
        """
        left = list(kinds)
        for key in self.keys:
            having = [kind for kind in left if key in kind.model_fields]
            if not having:
                continue
            known = list(dict.fromkeys(word for kind in having for word in words(kind.model_fields[key])))
            if not known:
                left = having if values.get(key) is not None else [kind for kind in left if kind not in having]
                continue
            word = values.get(key, words(having[0].model_fields[key])[0])
            left = [kind for kind in having if word in words(kind.model_fields[key])]
            if not left:
                raise ValueError(f"{HERE}.{key} is {word!r}, it should be {either([*map(repr, known)])}")
        return left[0]

    def without_idle(self, kinds: Sequence[type[Section]], values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the values without keys of other kinds that have their default there.

        Raises:
            ValueError: a word that no kind has.
        """
        chosen = self.pick(kinds, values)
        others = [kind.model_fields for kind in kinds if kind is not chosen]

        def counts(key: str, value: Any) -> bool:
            return key in chosen.model_fields or not any(key in f and _idle(f[key], value) for f in others)

        return {key: value for key, value in values.items() if counts(key, value)}


def _idle(field: FieldInfo, value: Any) -> bool:
    return value is None or (not field.is_required() and value == field.get_default(call_default_factory=True))


def words(field: FieldInfo) -> tuple[str, ...]:
    """Returns the words that a key can have; none where it can have other values."""
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


@dataclass(frozen=True)
class Sections:
    """The section, or the kinds of it, that a key can hold.

    Args:
        kinds: the section, or all kinds of it.
        one_of: how these are told apart; None where there is one.
    """

    kinds: tuple[type[Section], ...]
    one_of: OneOf | None = None

    @property
    def fields(self) -> dict[str, FieldInfo]:
        """All keys, those that tell the kinds apart first; one that several kinds have as the first has it."""
        every = [kind.model_fields for kind in self.kinds]
        telling = () if self.one_of is None else self.one_of.keys
        found = {key: next(fields[key] for fields in every if key in fields) for key in telling}
        for kind in self.kinds:
            found.update({key: field for key, field in kind.model_fields.items() if key not in found})
        return found

    @property
    def what(self) -> str:
        """The section, in a sentence."""
        return str(self.kinds[0].__doc__) if self.one_of is None else self.one_of.what

    def words(self, key: str) -> list[str]:
        """Returns the words that a key can have in any kind."""
        found = [kind.model_fields[key] for kind in self.kinds if key in kind.model_fields]
        return list(dict.fromkeys(word for field in found for word in words(field)))

    def where(self, key: str) -> str:
        """Describes the kinds that have a key, or what else it is for; empty where it is for all."""
        return self.kinds[0].taken_by(key) if self.one_of is None else self.one_of.having(self.kinds, key)

    def tells(self, key: str) -> bool:
        """Returns whether a key decides which kind is meant."""
        return self.one_of is not None and key in self.one_of.keys


def sections_in(annotation: Any, metadata: Sequence[Any] = (), *, lists: bool = False) -> Sections | None:
    """Returns the section in an annotation such as ``LoraSection | None``, or the kinds in a union of several.

    Args:
        annotation: of a key.
        metadata: what pydantic took off the annotation.
        lists: whether to search lists too.
    """
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return Sections((annotation,))
    told = next((m for m in metadata if isinstance(m, OneOf)), None)
    if told is not None:
        return Sections(get_args(annotation), told)
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return sections_in(inner, more, lists=lists)
    parts = () if get_origin(annotation) in (list, dict, tuple) and not lists else get_args(annotation)
    return next((found for part in parts if (found := sections_in(part, lists=lists)) is not None), None)


def settled(kind: type[Section], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the plain values of a configuration without those that have no effect: keys of other kinds of its
    sections, at their defaults. Files that were written with every key of every kind are then comparable with others.

    Raises:
        ValueError: a word that no kind of a section has.
    """
    result = dict(values)
    for name, field in kind.model_fields.items():
        found, inner = sections_in(field.annotation, field.metadata), values.get(name)
        if found is None or not isinstance(inner, Mapping):
            continue
        chosen = found.kinds[0]
        if found.one_of is not None:
            inner, chosen = found.one_of.without_idle(found.kinds, inner), found.one_of.pick(found.kinds, inner)
        result[name] = settled(chosen, chosen.settled(inner))
    return result
