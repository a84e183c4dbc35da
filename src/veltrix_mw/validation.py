"""Schemas: how flat keys become typed models, and what is wrong with them.

Owns the way from keys below a prefix to one object, and from a validator's complaint back to the key at fault.
Pure: no I/O, no thread, no clock; knows no store, snapshot or view. msgspec, pydantic and jsonschema are imported
when the first model asks for them.

No reason and no error made here holds any part of a value. The texts of validators are not passed on but told
anew from what the model says, and a member's name is shown only if a key or the model already names it.

What a model may be, and what it makes of JSON:

=====================================  =================================================================
dataclass, `msgspec.Struct`,           by msgspec, strictly: "5" is no int, 5.0 is no int, 5 is a float;
TypedDict, NamedTuple, plain types     dates, UUIDs, decimals, enums are read from their JSON forms
pydantic models and dataclasses,       by pydantic in its JSON mode, under the model's own config: lax
types that hold them, `TypeAdapter`    unless the model says `strict=True`, and then strict as for JSON
JSON Schema (a dict)                   by jsonschema, the dialect of its `$schema` (default: 2020-12);
                                       `format` and `default` only annotate; a `$ref` is never fetched
=====================================  =================================================================
"""

from __future__ import annotations

import dataclasses
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from types import MappingProxyType
from typing import Any, Final, NamedTuple, get_args, get_type_hints, is_typeddict

from veltrix_mw.errors import InvalidKey, InvalidValue, KeyMissing, SettingsError
from veltrix_mw.keys import check_key, check_prefix
from veltrix_mw.values import MAX_DEPTH, FrozenDict

__all__ = ["Fault", "Schema", "Schemas", "assemble", "bind"]

Below = Callable[[str], Iterable[tuple[str, Any, int]]]
"""(key, value, mod_revision) of the keys that begin with a prefix, ascending: `SortedMap.below`."""

Path = tuple[str | int, ...]
"""Where in a section: names of members and indices of items, from the section's top."""

_SUPPORTED: Final = (
    "a model is a dataclass, a msgspec.Struct or another type that msgspec knows, a pydantic model (install pydantic), "
    "or a JSON Schema as a dict (install veltrix-mw[jsonschema])"
)
_FIELD_NAMES: Final = str.maketrans("-.", "__")
_MAX_COMPLAINTS: Final = 1000  # of one value: enough to find a key at fault; a 1 MiB array can hold 500,000


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a section does not fit its schema.

    `key` is the stored key at fault, None when no one key is (a required field is missing, or a default of the
    app's is wrong). `reason` says what is wrong and where; it never holds any part of a value.
    """

    key: str | None
    reason: str


class Schema:
    """A schema: the keys below a prefix, or one key, and the model that they must fit.

    Immutable. `name` is the prefix (`payments/`) or the key (`checkout/max_items`).
    """

    __slots__ = ("_fitter", "name")

    def __init__(self, name: str, model: Any) -> None:
        self._fitter = _fitter_of(model, name)
        self.name: Final = name

    @property
    def is_prefix(self) -> bool:
        """Whether the schema is for the keys below a prefix, not for one key."""
        return self.name.endswith("/")

    def __repr__(self) -> str:
        return f"<Schema {self.name} {self._fitter.model}>"


class _Source(NamedTuple):
    """A value of a section, and the key that it came from: stored, or the app's own default."""

    value: Any
    key: str
    stored: bool


class Schemas:
    """Every schema of a client: finds those that a change touches, and the key at fault.

    Immutable and free of I/O; safe to share between threads. `layers` are the client's own, in order, already
    checked; `defaults` hold frozen values. Raises `SettingsError` (fix the settings) for an invalid prefix or key,
    a model of no supported kind, a JSON Schema that is none, and a default that its schema refuses.
    """

    __slots__ = ("_defaults", "_layers", "_schemas")

    def __init__(
        self,
        schemas: Mapping[str, Any],
        *,
        layers: Sequence[str] = (),
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        for name in schemas:
            try:
                if isinstance(name, str) and name.endswith("/"):
                    check_prefix(name)
                else:
                    check_key(name)
            except InvalidKey as exc:
                raise SettingsError(f"schemas: {exc}; write a prefix that ends with '/', or one key") from None
        self._layers: Final = tuple(layers)
        self._defaults: Final = dict(sorted(defaults.items()))
        self._schemas: Final = tuple(Schema(name, model) for name, model in schemas.items())
        for schema in self._schemas:
            section = self._defaults_of(schema)
            fault = _fit(schema._fitter, schema.name, section)[1] if section else None
            if fault is not None and fault.pathed:
                raise SettingsError(f"defaults: {fault.reason}")

    def __len__(self) -> int:
        return len(self._schemas)

    def __iter__(self) -> Iterator[Schema]:
        return iter(self._schemas)

    def touched(self, keys: Iterable[str]) -> list[Schema]:
        """The schemas that any of these stored keys falls under, directly or below one of the layers.

        Costs a sort of the keys (35 ns a key where they come in order, as a listing does; 500 if not), then a bisection
        or a few a schema.
        """
        if not self._schemas:
            return []
        ordered = sorted(keys)

        def holds(schema: Schema, start: str) -> bool:
            at = bisect_left(ordered, start)
            if at == len(ordered):
                return False
            return ordered[at].startswith(start) if schema.is_prefix else ordered[at] == start

        return [
            schema
            for schema in self._schemas
            if any(holds(schema, layer + schema.name) for layer in (*self._layers, ""))
        ]

    def check(self, schema: Schema, below: Below) -> Fault | None:
        """What is wrong with a schema's effective section, or None.

        The section is what a view of the client reads: its layers in order, over the base, over the defaults. A
        section without any stored key is valid, whatever the model requires.
        """
        section = self._defaults_of(schema)
        found = False
        # Least precedence first: what comes later covers it.
        for layer in ("", *reversed(self._layers)):
            for key, value in self._stored(schema, layer, below):
                found = True
                section[key[len(layer) + len(schema.name) :]] = _Source(value, key, stored=True)
        if not found:
            return None
        fault = _fit(schema._fitter, schema.name, section)[1]
        return None if fault is None else Fault(fault.key, fault.reason)

    def keys_of(self, schema: Schema, below: Below) -> list[str]:
        """The stored keys of a schema's section, in every layer and in the base, covered ones among them."""
        found = (key for layer in (*self._layers, "") for key, _ in self._stored(schema, layer, below))
        return list(dict.fromkeys(found))

    def _defaults_of(self, schema: Schema) -> dict[str, _Source]:
        return {
            key[len(schema.name) :]: _Source(value, key, stored=False)
            for key, value in self._defaults.items()
            if (key.startswith(schema.name) if schema.is_prefix else key == schema.name)
        }

    @staticmethod
    def _stored(schema: Schema, layer: str, below: Below) -> Iterator[tuple[str, Any]]:
        start = layer + schema.name
        for key, value, _ in below(start):
            if schema.is_prefix:
                yield key, value
            else:
                # Ascending: the key itself comes before all that begin with it.
                if key == start:
                    yield key, value
                return


def bind(model: Any, prefix: str, section: Mapping[str, Any]) -> Any:
    """Make the typed object of the keys below `prefix`.

    `section` maps what follows the prefix to a frozen value, precedence resolved; for a single key (`prefix`
    without its trailing '/') it is `{"": value}`. Below the prefix '/' nests fields, '-' and '.' become '_'; a
    value that is an object may stand for nested fields. A model with defaults binds an empty section. A JSON Schema
    gives a `FrozenDict` (or the single key's value), all else an instance of the model. Instances are shared by
    requests: prefer frozen models (`@dataclass(frozen=True)`, `frozen=True` in a Struct or in pydantic's config).

    Raises `InvalidValue` (fix the value) naming the key and what is wrong, never a value; `KeyMissing` for a single
    key without a value; `SettingsError` (fix the code) for a model of no supported kind.
    """
    fitter = _fitter_of(model, prefix)
    if not section and not prefix.endswith("/"):
        raise KeyMissing(f"there is no key {prefix!r}")
    made, fault = _fit(
        fitter, prefix, {suffix: _Source(value, prefix + suffix, stored=True) for suffix, value in section.items()}
    )
    if fault is not None:
        raise InvalidValue(fault.reason)
    return made


def assemble(section: Mapping[str, Any]) -> tuple[FrozenDict, dict[Path, str]]:
    """Nest a section: (the tree, and for the path of each value in it what followed the prefix).

    Raises `InvalidValue` for two that are one field, a value beside values below it, and more than `MAX_DEPTH`
    segments.
    """
    tree, places, clash = _assemble(section)
    if clash is not None:
        raise InvalidValue(clash.told(*(repr(suffix) for suffix in clash.suffixes)))
    return tree, places


class _Clash(NamedTuple):
    """Why keys do not make one tree: a text with a place for each of the suffixes concerned."""

    text: str
    suffixes: tuple[str, ...]

    def told(self, *names: str) -> str:
        return self.text.format(*names)


_BESIDE: Final = "{0} is a value, and {1} lies below it: one field cannot be both; delete one of the keys"
_TWICE: Final = "{0} and {1} are the same field ('-' and '.' become '_'); delete one of the keys"
_DEEP: Final = f"{{0}} nests deeper than {MAX_DEPTH} levels"


def _assemble(section: Mapping[str, Any]) -> tuple[FrozenDict, dict[Path, str], _Clash | None]:
    places: dict[Path, str] = {}
    nothing = FrozenDict()
    for suffix in sorted(section):
        path: Path = tuple(suffix.translate(_FIELD_NAMES).split("/"))
        if len(path) > MAX_DEPTH:
            return nothing, {}, _Clash(_DEEP, (suffix,))
        other = places.setdefault(path, suffix)
        if other != suffix:
            return nothing, {}, _Clash(_TWICE, (other, suffix))
    tree: dict[str, Any] = {}
    nodes: dict[Path, dict[str, Any]] = {(): tree}
    for path, suffix in places.items():
        for depth in range(1, len(path)):
            above = path[:depth]
            if above in places:
                return nothing, {}, _Clash(_BESIDE, (places[above], suffix))
            if above not in nodes:
                nodes[above] = nodes[above[:-1]][str(above[-1])] = {}
        nodes[path[:-1]][str(path[-1])] = section[suffix]
    return _frozen(tree), places, None


def _frozen(node: dict[str, Any]) -> FrozenDict:
    return FrozenDict({name: _frozen(item) if type(item) is dict else item for name, item in node.items()})


class _Found(NamedTuple):
    """A fault, and whether it lies in one key (stored or not) rather than in what is missing between them."""

    key: str | None
    reason: str
    pathed: bool


def _fit(fitter: _Fitter, name: str, section: Mapping[str, _Source]) -> tuple[Any, _Found | None]:
    """(the object made of a section, None), or (None, what is wrong)."""
    places: dict[Path, str]
    values = {suffix: source.value for suffix, source in section.items()}
    if name.endswith("/"):
        tree, places, clash = _assemble(values)
        if clash is not None:
            sources = [section[suffix] for suffix in clash.suffixes]
            stored = [source.key for source in sources if source.stored]
            text = clash.told(*(repr(source.key) + ("" if source.stored else " (a default)") for source in sources))
            return None, _Found(stored[0] if len(stored) == 1 else None, text, pathed=True)
    else:
        tree, places = values[""], {(): ""}
    made = fitter.fit(tree)
    if not isinstance(made, _Complaints):
        return made, None
    picked, source = made.all[0], None
    for complaint in made.all:
        suffix = _place(complaint.path, places)
        if suffix is not None:
            picked, source = complaint, section[suffix]
            break
    depth = len(_known_part(picked.path, places))
    where = _told(picked.path, depth, fitter.names | picked.names)
    subject = repr(name if source is None else source.key)
    reason = f"{subject} does not fit {fitter.model}: {picked.what}{f' at `{where}`' if where else ''}"
    if source is not None and not source.stored:
        reason += " (the value is the app's own default)"
    return None, _Found(source.key if source is not None and source.stored else None, reason, source is not None)


def _place(path: Path, places: Mapping[Path, str]) -> str | None:
    """The one value that a path leads to or into."""
    for depth in range(len(path), -1, -1):
        suffix = places.get(path[:depth])
        if suffix is not None:
            return suffix
    return None


def _known_part(path: Path, places: Mapping[Path, str]) -> Path:
    """As much of a path as keys spell out: what follows lies inside a value, or nowhere."""
    spelt: Path = ()
    for place in places:
        depth = 0
        while depth < min(len(place), len(path)) and place[depth] == path[depth]:
            depth += 1
        if depth > len(spelt):
            spelt = path[:depth]
    return spelt


def _told(path: Path, known: int, names: frozenset[str]) -> str:
    """A path to show: a name that neither keys nor the model spell out is a part of a value, and hidden."""
    text = ""
    for at, step in enumerate(path):
        if isinstance(step, int):
            text += f"[{step}]"
        elif at < known or step in names:
            text += f".{step}"
        else:
            text += "[...]"
    return text.removeprefix(".")


class _Complaint(NamedTuple):
    """One thing that is wrong: where, and what, told from the model's side alone.

    `names` are the member names that the model was heard to spell in this complaint.
    """

    path: Path
    what: str
    names: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class _Complaints:
    all: tuple[_Complaint, ...]


@dataclass(frozen=True, slots=True)
class _Fitter:
    """One model, ready: `fit` makes its object of a tree or returns `_Complaints`, and raises nothing."""

    model: str  # as messages call it
    fit: Callable[[Any], Any]
    names: frozenset[str] = frozenset()  # the member names that the model spells


def _fitter_of(model: Any, name: str) -> _Fitter:
    """The fitter of a model for a prefix or a key; raises `SettingsError` naming it."""
    try:
        if isinstance(model, Mapping):
            try:
                text = json.dumps(_thawed(model))
            except (TypeError, ValueError, RecursionError) as exc:
                raise SettingsError(f"not a JSON Schema: it is not JSON ({type(exc).__name__})") from exc
            return _json_schema_fitter(text)
        try:
            hash(model)
        except TypeError:  # an Annotated with a list in it: made anew each time
            return _type_fitter.__wrapped__(model, whole=name.endswith("/"))
        return _type_fitter(model, whole=name.endswith("/"))
    except SettingsError as exc:
        raise SettingsError(f"the schema of {name!r}: {exc}") from exc.__cause__


# Compiling a pydantic adapter takes milliseconds, and `bind` names its model at every call. 256 models are more
# than an app has; the bound is for code that makes models in a loop.
@lru_cache(maxsize=256)
def _type_fitter(model: Any, *, whole: bool) -> _Fitter:
    if _holds_pydantic(model, set()):
        return _pydantic_fitter(model)
    return _msgspec_fitter(model, whole=whole)


def _name_of(model: Any) -> str:
    return model.__name__ if isinstance(model, type) and not get_args(model) else str(model).replace("typing.", "")


def _refused(exc: Exception) -> _Complaints:
    """What a validator's own exception may say: its class. Its text may quote the value."""
    return _Complaints((_Complaint((), _refusal(exc)),))


def _refusal(exc: object) -> str:
    return f"refused by the model's own validator ({type(exc).__name__})"


# --- msgspec ---------------------------------------------------------------------------------------------------

_MSGSPEC_PATH: Final = re.compile(r" - at (?P<key>`key` in )?`\$(?P<path>[^`]*)`\Z")
_MSGSPEC_STEP: Final = re.compile(r"\[(?P<item>\d+)\]|(?P<member>\[\.\.\.\])|\.(?P<field>[^.\[]+)")
_MSGSPEC_FIELD: Final = re.compile(r"Object (?:missing required|contains unknown) field `(.*)`\Z", re.DOTALL)
_MSGSPEC_TOLD: Final = re.compile(
    r"Expected `|(?:Integer value|Number|Duration|Timestamp) (?:is )?out of range\Z|"
    r"Invalid (?:base64 encoded string|RFC3339 encoded (?:date|datetime|time)|ISO8601 duration|UUID|decimal string|"
    r"epoch timestamp)\Z"
)
"""The messages that msgspec builds from the type alone; all others may quote the value."""


def _msgspec_fitter(model: Any, *, whole: bool) -> _Fitter:
    import msgspec
    from msgspec import inspect

    try:
        info = inspect.type_info(model)
        strangers = _strangers(info, inspect)
    except Exception as exc:  # annotations are the app's code and raise anything
        raise SettingsError(f"{_name_of(model)} cannot be used as a model ({exc}); {_SUPPORTED}") from exc
    if strangers:
        raise SettingsError(f"{_name_of(model)} holds {', '.join(strangers)}, unknown to msgspec; {_SUPPORTED}")
    if whole and not _takes_object(info, inspect):
        raise SettingsError(
            f"{_name_of(model)} is no model for the keys below a prefix, which make an object; for one key, leave out "
            "the trailing '/'"
        )

    def fit(tree: Any) -> Any:
        try:
            return msgspec.convert(tree, model, str_keys=True)
        except msgspec.ValidationError as exc:
            message, cause = str(exc), exc.__cause__
        except Exception as exc:  # noqa: BLE001  __post_init__ is the app's code and raises anything
            return _refused(exc)
        return _Complaints((_msgspec_complaint(message, cause, tree, again),))

    def again(tree: Any) -> str:
        """The message for another tree."""
        try:
            msgspec.convert(tree, model, str_keys=True)
        except Exception as exc:  # noqa: BLE001  as above
            return str(exc)
        return ""

    return _Fitter(_name_of(model), fit)


def _strangers(info: Any, inspect: Any) -> list[str]:
    """The classes in a model that msgspec can only test with isinstance: no JSON becomes one."""
    strangers, seen, waiting = [], set(), [info]
    while waiting:
        node = waiting.pop()
        if isinstance(node, tuple):
            waiting.extend(node)
        elif isinstance(node, (inspect.Type, inspect.Field)) and id(node) not in seen:
            seen.add(id(node))
            if isinstance(node, inspect.CustomType) and node.cls is not object:
                strangers.append(_name_of(node.cls))
            waiting.extend(getattr(node, name) for name in node.__struct_fields__)
    return sorted(set(strangers))


def _takes_object(info: Any, inspect: Any) -> bool:
    if isinstance(info, inspect.Metadata):
        return _takes_object(info.type, inspect)
    if isinstance(info, inspect.UnionType):
        return any(_takes_object(one, inspect) for one in info.types)
    if isinstance(info, inspect.StructType):
        return not info.array_like
    kinds = (inspect.DataclassType, inspect.TypedDictType, inspect.DictType, inspect.AnyType, inspect.CustomType)
    return isinstance(info, kinds)


def _msgspec_complaint(message: str, cause: BaseException | None, tree: Any, again: Callable[[Any], str]) -> _Complaint:
    """Read a message of msgspec's, such as "Expected `int`, got `str` - at `$.stripe.retries[0]`"."""
    names: set[str] = set()
    read = _MSGSPEC_PATH.search(message)
    what = message[: read.start()] if read else message
    steps = read["path"] + ("[...]" if read["key"] else "") if read else ""
    path: Path = ()
    for step in _MSGSPEC_STEP.finditer(steps):
        if step["item"]:
            path += (int(step["item"]),)
        elif step["field"]:
            path += (step["field"],)
            names.add(step["field"])
        else:
            member = _culprit(message, tree, path, again)
            if member is None:
                break
            path += (member,)
    if cause is not None:
        return _Complaint(path, _refusal(cause), frozenset(names))
    field = _MSGSPEC_FIELD.match(what)
    if field is not None and what.startswith("Object missing"):
        return _Complaint((*path, field[1]), "a required field is missing", frozenset({*names, field[1]}))
    if field is not None:
        return _Complaint((*path, field[1]), "unknown field", frozenset(names))
    if what.startswith("Invalid enum value"):
        what = "not one of the allowed values"
    elif what.startswith("Invalid value"):
        what = "no known tag"
    elif not _MSGSPEC_TOLD.match(what):
        what = "it does not fit"
    return _Complaint(path, what[0].lower() + what[1:], frozenset(names))


def _culprit(message: str, tree: Any, path: Path, again: Callable[[Any], str]) -> str | None:
    """The member that msgspec means by `[...]`: the last of the shortest head of the object with the same complaint.

    msgspec hides members' names and stops at the first fault, so that bisecting finds it in log2(members) tries.
    """
    node = tree
    try:
        for step in path:
            node = node[step]
    except (KeyError, IndexError, TypeError):
        return None  # a field was renamed to something with a dot or a bracket in it
    if not isinstance(node, dict):
        return None
    members = list(node.items())
    low, high = 1, len(members)
    while low < high:
        middle = (low + high) // 2
        heard = again(_replaced(tree, path, FrozenDict(members[:middle])))
        if heard == message:
            high = middle
        elif " of length " in heard:
            return None  # a head is too short for the model: nothing is learnt about members
        else:
            low = middle + 1
    return members[low - 1][0] if members else None


def _replaced(tree: Any, path: Path, node: Any) -> Any:
    if not path:
        return node
    inner = _replaced(tree[path[0]], path[1:], node)
    if isinstance(tree, dict):
        return FrozenDict({**tree, str(path[0]): inner})
    return tuple(inner if at == path[0] else item for at, item in enumerate(tree))


# --- pydantic --------------------------------------------------------------------------------------------------

_PYDANTIC_TOLD: Final[Mapping[str, str]] = MappingProxyType(
    {
        "missing": "a required field is missing",
        "extra_forbidden": "unknown field",
        "greater_than": "expected a value > {gt}",
        "greater_than_equal": "expected a value >= {ge}",
        "less_than": "expected a value < {lt}",
        "less_than_equal": "expected a value <= {le}",
        "multiple_of": "expected a multiple of {multiple_of}",
        "too_short": "expected at least {min_length} items",
        "too_long": "expected at most {max_length} items",
        "string_too_short": "expected at least {min_length} characters",
        "string_too_long": "expected at most {max_length} characters",
        "string_pattern_mismatch": "expected a string matching {pattern!r}",
        "enum": "expected {expected}",
        "literal_error": "expected {expected}",
        "union_tag_invalid": "no known tag; expected one of {expected_tags}",
        "union_tag_not_found": "the tag {discriminator} is missing",
        "string_type": "expected a string",
        "bool_type": "expected a boolean",
        "bool_parsing": "expected a boolean",
        "int_type": "expected an integer",
        "int_parsing": "expected an integer",
        "int_from_float": "expected an integer",
        "float_type": "expected a number",
        "float_parsing": "expected a number",
        "none_required": "expected null",
        "list_type": "expected an array",
        "tuple_type": "expected an array",
        "set_type": "expected an array",
        "dict_type": "expected an object",
        "model_type": "expected an object",
        "dataclass_type": "expected an object",
    }
)
"""pydantic's types of error, told anew: its own messages quote values (tags, characters of a UUID, custom texts)."""


def _holds_pydantic(model: Any, seen: set[int]) -> bool:
    """Whether a type needs pydantic: it is one of pydantic's, or mentions one."""
    if id(model) in seen:
        return False
    seen.add(id(model))
    if hasattr(model, "__get_pydantic_core_schema__") or hasattr(model, "__pydantic_validator__"):
        return True
    # Constraints such as PositiveInt's come from annotated_types; msgspec would ignore them without a word.
    if type(model).__module__.split(".")[0] in {"pydantic", "annotated_types"}:
        return True
    inner = list(get_args(model))
    if (isinstance(model, type) and dataclasses.is_dataclass(model)) or is_typeddict(model):
        try:
            inner += get_type_hints(model, include_extras=True).values()
        except Exception:  # noqa: BLE001  msgspec meets the same annotations, and tells
            return False
    return any(_holds_pydantic(one, seen) for one in inner)


def _pydantic_fitter(model: Any) -> _Fitter:
    try:
        import pydantic
        from pydantic_core.core_schema import ErrorType
    except ImportError as exc:
        raise SettingsError(f"{_name_of(model)} needs pydantic (2.7 or newer): install it") from exc

    known_types = frozenset(get_args(ErrorType))
    try:
        adapter = model if isinstance(model, pydantic.TypeAdapter) else pydantic.TypeAdapter(model)
        if not getattr(adapter, "pydantic_complete", True):  # since 2.10
            adapter.rebuild(raise_errors=True)
    except Exception as exc:  # annotations are the app's code and raise anything
        first = str(exc).splitlines()[:1]
        raise SettingsError(f"{_name_of(model)} cannot be used as a model ({''.join(first)}); {_SUPPORTED}") from exc
    spellings: dict[str, set[str]] = {}
    _collect_names(model, spellings, set())

    def fit(tree: Any) -> Any:
        # JSON mode, so that strict models take what JSON has: arrays for tuples and sets, text for dates.
        try:
            return adapter.validate_json(json.dumps(tree, ensure_ascii=False))
        except pydantic.ValidationError as exc:
            errors = exc.errors(include_url=False, include_input=False)[:_MAX_COMPLAINTS]
        except Exception as exc:  # noqa: BLE001  validators are the app's code and raise anything
            return _refused(exc)
        return _Complaints(tuple(complaint(error, tree) for error in errors))

    def complaint(error: Any, tree: Any) -> _Complaint:
        kind, context, loc = error["type"], error.get("ctx", {}), error["loc"]
        missing = kind == "missing" and loc
        path = _pydantic_path(loc[:-1] if missing else loc, tree, spellings)
        if missing:
            path += (loc[-1],)
        if kind in {"value_error", "assertion_error"} and isinstance(context.get("error"), Exception):
            return _Complaint(path, _refusal(context["error"]))
        if kind not in known_types or kind == "value_error":
            return _Complaint(path, "refused by the model's own validator")
        try:
            return _Complaint(path, _PYDANTIC_TOLD[kind].format_map(context))
        except KeyError:
            return _Complaint(path, f"it does not fit ({kind})")

    names = frozenset(spellings)
    return _Fitter("the TypeAdapter" if adapter is model else _name_of(model), fit, names)


def _collect_names(model: Any, spellings: dict[str, set[str]], seen: set[int]) -> None:
    """For each name that a model's fields go by, in Python or in JSON, all the names that the field goes by."""
    if id(model) in seen:
        return
    seen.add(id(model))
    fields = getattr(model, "__pydantic_fields__", None) or getattr(model, "model_fields", None)  # before 2.10
    if isinstance(model, type) and fields is None and dataclasses.is_dataclass(model):
        fields = {field.name: field for field in dataclasses.fields(model)}
    elif is_typeddict(model):
        fields = dict(model.__annotations__)
    if not isinstance(model, type) or not isinstance(fields, dict):
        fields = {}
    for name, field in fields.items():
        other = getattr(field, "validation_alias", None)
        aliases = [step for one in getattr(other, "choices", [other]) for step in getattr(one, "path", [one])]
        names = {name, *(step for step in aliases if isinstance(step, str))}
        for one in names:
            spellings.setdefault(one, set()).update(names)
        _collect_names(getattr(field, "annotation", getattr(field, "type", field)), spellings, seen)
    for inner in get_args(model):
        _collect_names(inner, spellings, seen)


def _pydantic_path(loc: Sequence[str | int], tree: Any, spellings: Mapping[str, set[str]]) -> Path:
    """The path in the tree that an error's `loc` means.

    A `loc` may spell a field another way than the tree does (`loc_by_alias=False`), and names members of unions and
    validators on the way, which the tree does not have: they are skipped.
    """
    path: Path = ()
    node = tree
    for step in loc:
        if isinstance(node, dict):
            name = next((one for one in (str(step), *spellings.get(str(step), ())) if one in node), None)
            if name is None:
                continue
            path, node = (*path, name), node[name]
        elif isinstance(node, tuple) and isinstance(step, int) and step < len(node):
            path, node = (*path, step), node[step]
    return path


# --- JSON Schema -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)  # keyed by the text, which is also the copy: the app's dict may change later
def _json_schema_fitter(text: str) -> _Fitter:
    try:
        import referencing
        from jsonschema import SchemaError  # type: ignore[import-untyped, unused-ignore]
        from jsonschema import validators as found_validators
    except ImportError as exc:
        raise SettingsError("a JSON Schema needs jsonschema: install veltrix-mw[jsonschema]") from exc

    schema = json.loads(text)
    validators: Any = found_validators  # untyped, or typed more narrowly than it is
    try:
        dialect = validators.validator_for(schema, default=None) if "$schema" in schema else None
        if dialect is None and "$schema" in schema:
            raise SettingsError("its $schema is no dialect that jsonschema knows")
        dialect = dialect or validators.Draft202012Validator
        dialect.check_schema(schema)
        _check_references(schema, dialect)
    except SettingsError:
        raise
    except SchemaError as exc:
        raise SettingsError(f"not a valid JSON Schema at {exc.json_path}: {exc.message[:200]}") from exc
    except Exception as exc:  # a malformed schema breaks the checker in many ways
        raise SettingsError(f"not a valid JSON Schema ({type(exc).__name__})") from exc
    # A registry of our own, as the default one fetches a `$ref` over the network.
    validator = dialect(schema, registry=referencing.Registry())

    def fit(tree: Any) -> Any:
        # Lists, as a JSON Schema's "array" is no tuple. jsonschema's type checkers could be told so, but a schema
        # that refers to itself and has a `$schema` gets the stock ones again.
        try:
            found = list(islice(_json_schema_complaints(validator.iter_errors(_thawed(tree))), _MAX_COMPLAINTS))
        except Exception as exc:  # noqa: BLE001  such as OverflowError from multipleOf
            return _Complaints((_Complaint((), f"its JSON Schema cannot be applied ({type(exc).__name__})"),))
        return _Complaints(tuple(found)) if found else tree

    title = schema.get("title")
    return _Fitter(f"the JSON Schema {title!r}" if isinstance(title, str) else "its JSON Schema", fit, _spelt(schema))


def _thawed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _thawed(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_thawed(item) for item in value]
    return value


def _check_references(schema: Any, dialect: Any) -> None:
    """Raise `SettingsError` for a `$ref` that leads nowhere: else each value would fail, or only some, some day."""
    from jsonschema_specifications import REGISTRY  # type: ignore[import-untyped, unused-ignore]
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import specification_with

    top = specification_with(dialect.META_SCHEMA["$schema"]).create_resource(schema)
    waiting = [(top, REGISTRY.resolver_with_root(top))]
    while waiting:
        resource, resolver = waiting.pop()
        contents: Any = resource.contents
        for keyword in ("$ref", "$dynamicRef", "$recursiveRef"):
            reference = contents.get(keyword) if isinstance(contents, dict) else None
            if isinstance(reference, str):
                try:
                    resolver.lookup(reference)
                except Unresolvable as exc:
                    raise SettingsError(
                        f"its {keyword} {reference!r} leads nowhere; nothing is fetched: put it under $defs"
                    ) from exc
        waiting.extend((inner, resolver.in_subresource(inner)) for inner in resource.subresources())


def _spelt(schema: Any) -> frozenset[str]:
    """The member names that a schema spells."""
    names: set[str] = set()
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            names.update(node)
            required = node.get("required")
            if isinstance(required, list):
                names.update(name for name in required if isinstance(name, str))
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)
    return frozenset(names)


def _json_schema_complaints(errors: Iterable[Any]) -> Iterator[_Complaint]:
    """Tell errors of jsonschema's from the schema's side: its own messages quote the value."""
    for error in errors:
        path: Path = tuple(error.absolute_path)
        keyword, wanted, rules = error.validator, error.validator_value, error.schema
        if keyword is None:
            yield _Complaint(path, "no value is allowed")
        elif keyword == "required" and isinstance(wanted, list):
            missing = next((name for name in wanted if name not in error.instance), None)
            yield _Complaint(path if missing is None else (*path, missing), "a required member is missing")
        elif keyword == "additionalProperties" and wanted is False:
            declared, patterns = rules.get("properties", {}), rules.get("patternProperties", {})
            for name in error.instance:
                if name not in declared and not any(re.search(pattern, name) for pattern in patterns):
                    yield _Complaint((*path, name), "unknown member")
        elif "propertyNames" in error.absolute_schema_path and isinstance(error.instance, str):
            yield _Complaint((*path, error.instance), f"a member's name fails `{keyword}`")
        elif keyword == "type":
            yield _Complaint(path, "expected " + " or ".join([wanted] if isinstance(wanted, str) else map(str, wanted)))
        elif isinstance(wanted, dict) or keyword in {"allOf", "anyOf", "oneOf", "prefixItems"}:
            yield _Complaint(path, f"fails `{keyword}`")
        else:
            yield _Complaint(path, f"fails `{keyword}`: {json.dumps(wanted, ensure_ascii=False)[:200]}")
