"""The view: what one request reads, pinned to one snapshot.

Owns how overrides, layers, base and defaults resolve, and the memo that makes a hot read one subscript. Does no I/O.
Knows no framework and no client; of the `Views` that made it, it asks for what all views of a client share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

from veltrix_mw.deriving import MOST_DERIVED, Derived
from veltrix_mw.errors import HeldBack, InvalidKey, KeyMissing, NotLoaded, NotReady, StaleRead
from veltrix_mw.freshness import Freshness, FreshnessRules
from veltrix_mw.keys import check_key, check_prefix, is_key, unit_of
from veltrix_mw.memo import Memo
from veltrix_mw.pinning import pinned_view
from veltrix_mw.section import Section
from veltrix_mw.snapshot import Snapshot
from veltrix_mw.values import MISSING, FrozenDict
from veltrix_mw.words import ago

if TYPE_CHECKING:
    from opentelemetry.context import Context

    from veltrix_mw.unit_reader import UnitReader
    from veltrix_mw.views import Views

__all__ = ["View"]

T = TypeVar("T")
Model = TypeVar("Model")

_HOT_KEYS: Final = 1024  # keys a memo holds: what an app reads by name; a scan only empties it
_SECTIONS: Final = 256

# Entries that a view with layers or overrides of its own keeps of each: its key names, its sections together, and what
# a derived value of it read. There may be as many such views as a client invents tenants; the base view is one.
_KEPT_ENTRIES: Final = 256

_UNITS: Final = (
    1_000  # lazy units that a view keeps: a request wants a few, a script that walks through all of them none
)

_NO_OVERRIDES: Final[Mapping[str, Any]] = FrozenDict()


class View(Mapping[str, Any]):
    """One request's configuration: a mapping from key to frozen value, pinned to one snapshot.

    Every read sees the same revision, and does no I/O; only `fetch` and its like do. A key is looked up in the
    overrides, the request's layers in order, the client's layers, the base, the defaults; the first that has it wins.

    Reading raises `KeyMissing` (no such key), `HeldBack` (its value was rejected and no good one is known), `NotLoaded`
    (it lies below a lazy prefix, or a layer does, and that unit was not fetched), `StaleRead` (it is older than its
    prefix allows), or `NotReady` (nothing was listed yet; keys in the defaults can be read all the same). `get` gives
    its default for `KeyMissing` alone.
    """

    __slots__ = (
        "__weakref__",
        "_derived",
        "_hot",
        "_keys",
        "_layers",
        "_memo",
        "_overrides",
        "_own",
        "_request_layers",
        "_sections",
        "_snapshot",
        "_units",
        "_views",
    )

    _hot: dict[str, Any]  # memo of keys that were read and found
    _snapshot: Snapshot
    _views: Views
    _layers: tuple[str, ...]  # the request's, then the client's
    _request_layers: tuple[str, ...]
    _overrides: Mapping[str, Any]  # the process's over its own
    _own: Mapping[str, Any]
    _keys: tuple[str, ...] | None
    _sections: dict[str, Section]
    _derived: dict[Any, Derived]
    _units: dict[str, Snapshot | str]  # lazy units as of this view; a str says why one could not be loaded
    _memo: Memo | None  # where prefixes are to be fresh: sees to it that the memos above forget what is too old

    def __init__(self) -> None:
        raise TypeError("views are made by client.view(), by the middleware and by client.pinned()")

    @classmethod
    def _make(
        cls,
        views: Views,
        snapshot: Snapshot,
        request_layers: tuple[str, ...],
        overrides: Mapping[str, Any],
        hot: dict[str, Any],
        own: Mapping[str, Any] = _NO_OVERRIDES,
    ) -> View:
        view = object.__new__(cls)
        view._hot = hot
        view._snapshot = snapshot
        view._views = views
        view._request_layers = request_layers
        view._layers = request_layers + views.layers
        view._overrides = overrides
        view._own = own
        view._keys = None
        view._sections = {}
        view._derived = {}
        view._units = {}
        fresh = views.freshness is not None
        view._memo = Memo(snapshot._proof, hot, view._sections, view._derived) if fresh else None
        return view

    def _as(self, kind: type[_V]) -> _V:
        """This view with another way of reading; what was memoized is shared."""
        view = object.__new__(kind)
        view._hot = self._hot
        view._snapshot = self._snapshot
        view._views = self._views
        view._request_layers = self._request_layers
        view._layers = self._layers
        view._overrides = self._overrides
        view._own = self._own
        view._keys = self._keys
        view._sections = self._sections
        view._derived = self._derived
        view._units = self._units
        view._memo = self._memo
        return view

    def _of_one(self, units: dict[str, Snapshot | str] | None = None) -> View:
        """This view for one caller, who loads units into it, beside `units`; what was memoized is shared."""
        view = self._as(View)
        view._units = {} if units is None else units
        return view

    # Reading

    def __getitem__(self, key: str) -> Any:
        try:
            return self._hot[key]
        except KeyError:
            pass  # and not below: an error raised there would show this one as its context
        return self._find(key)

    def get(self, key: str, /, default: Any = None) -> Any:
        """The value of `key`, or `default` when there is none. Raises what `[]` does, but for `KeyMissing`."""
        try:
            return self._hot[key]
        except KeyError:
            pass
        value = self._remembered(key)
        return default if value is MISSING else value

    def __contains__(self, key: object) -> bool:
        return key in self._hot or self._remembered(key) is not MISSING

    def _find(self, key: str) -> Any:
        value = self._remembered(key)
        if value is MISSING:
            raise self._absent(key)
        return value

    def _remembered(self, key: object) -> Any:
        """`_resolve`, and what it finds goes into the memo."""
        value = self._resolve(key)
        # There are any number of lazy keys: those that all requests read are not to go because of them.
        if value is not MISSING and not (self._views.lazy and key.startswith(self._views.lazy)):  # type: ignore[attr-defined]
            limit_s = math.inf if self._memo is None else self._limit_of(key)  # type: ignore[arg-type]
            if limit_s > 0:
                hot = self._hot
                if len(hot) >= _HOT_KEYS:
                    hot.clear()
                hot[key] = value  # type: ignore[index]
                self._remember_until(limit_s)
        return value

    def _resolve(self, key: object) -> Any:
        """The value of `key` by the order of precedence, or `MISSING`; raises what `[]` does, but for `KeyMissing`."""
        if not isinstance(key, str):
            return MISSING
        if key in self._overrides:
            return self._overrides[key]
        snapshot = self._snapshot
        defaults = self._views.defaults
        if snapshot._origin == "none":
            if key in defaults:
                return defaults[key]
            raise self._not_ready(key)
        if self._views.lazy or self._memo is not None:
            return self._resolve_by_name(key)
        entries = snapshot._entries
        for layer in self._layers:
            value = entries.get(layer + key)
            if value is not MISSING:
                return value
        value = entries.get(key)
        if value is not MISSING:
            return value
        if key in defaults:
            return defaults[key]
        if snapshot._rejected:
            for name in (*(layer + key for layer in self._layers), key):
                _check_held(snapshot, name)
        return MISSING

    def _resolve_by_name(self, key: str) -> Any:
        """As `_resolve` goes on, where some prefixes are lazy, or are to be fresh."""
        read: list[tuple[Snapshot, str]] = []
        for name in self._usable(self._names(key)):
            holder = self._holder(name)
            value = holder._entries.get(name)
            if value is not MISSING:
                return value
            read.append((holder, name))
        if key in self._views.defaults:
            return self._views.defaults[key]
        for holder, name in read:
            _check_held(holder, name)
        return MISSING

    def _names(self, key: str) -> tuple[str, ...]:
        """The store's keys that a key stands for: those in the layers, and itself."""
        return (*(layer + key for layer in self._layers), key)

    def _holder(self, name: str) -> Snapshot:
        """What holds a key or a prefix: its lazy unit, or the snapshot. Raises `NotLoaded`.

        That a key is not in the snapshot does not say that it is absent where it is lazy.
        """
        lazy = self._views.lazy
        if not name.startswith(lazy):
            return self._snapshot
        unit = unit_of(name, lazy)
        held = self._units.get(unit)
        if isinstance(held, Snapshot):
            return held
        units = self._views.units
        found = None if units is None or not unit else units.get(unit, self._snapshot)
        if found is None:
            raise self._not_loaded(name, unit, held)
        self._keep(unit, found)
        return found

    def _not_loaded(self, name: str, unit: str, why: str | None) -> NotLoaded:
        if not unit:
            return NotLoaded(f"all of {name!r} is in no worker, as it is lazy: read one unit below it at a time")
        if why:
            return NotLoaded(f"{name!r} lies in the lazy unit {unit!r}, which could not be loaded: {why}")
        return NotLoaded(
            f"{name!r} lies in the lazy unit {unit!r}, which is not loaded: fetch it first, by view.fetch({name!r}), "
            "in a coroutine by await view.afetch(...), or by the middleware's prefetch="
        )

    def _keep(self, unit: str, found: Snapshot | str, most: int = _UNITS) -> None:
        units = self._units
        if len(units) >= most and unit not in units:
            units.pop(next(iter(units)), None)
        units[unit] = found

    def _absent(self, key: object) -> KeyMissing:
        if not isinstance(key, str) or not is_key(key):
            return KeyMissing(f"{key!r} is not a key; keys look like checkout/max_items")
        if self._memo is not None and any(map(self._is_too_old, self._names(key))):
            return KeyMissing(f"{key!r} has no default, and what the store has is older than its prefix allows")
        below = f", nor below {', '.join(self._layers)}" if self._layers else ""
        return KeyMissing(f"there is no key {key!r} at revision {self._snapshot._revision}{below}")

    def _not_ready(self, what: str) -> NotReady:
        reason = self._views.trouble()
        return NotReady(
            f"cannot read {what!r}: nothing was listed yet and no last-known-good was found"
            + (f" ({reason})" if reason else "")
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._all_keys())

    def __len__(self) -> int:
        return len(self._all_keys())

    def _all_keys(self) -> tuple[str, ...]:
        keys, passed = self._keys, self._passed_over("")
        if keys is None or passed:
            if self._snapshot._origin == "none" and not self._overrides and not self._views.defaults:
                raise self._not_ready("the keys")
            found = {item[0] for item in self._below("")} if passed else set(self._snapshot._entries)
            found.update(self._views.defaults, self._overrides)
            for layer in self._layers:
                cut = len(layer)
                found.update(item[0][cut:] for item in self._below(layer))
            keys = tuple(sorted(found))
            if not passed and (self._is_base or len(keys) <= _KEPT_ENTRIES):
                self._keys = keys
        return keys

    @property
    def _is_base(self) -> bool:
        """Whether it is the one that all requests without layers and overrides of their own share."""
        return not self._request_layers and not self._own

    def __repr__(self) -> str:
        layers = f" layers={','.join(self._layers)}" if self._layers else ""
        return f"<View revision={self.revision} origin={self.origin}{layers}>"

    def __eq__(self, other: object) -> bool:
        # Two views are equal if they are pinned alike, and that must be cheap: asgiref compares context variables at
        # each hop between threads, which for two mappings would be a comparison of whole keyspaces.
        if isinstance(other, View):
            alike = (
                self._snapshot is other._snapshot
                and self._overrides is other._overrides
                and self._units is other._units
            )
            return alike and self._views is other._views and self._layers == other._layers
        return super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]

    # What it is pinned to

    @property
    def revision(self) -> int:
        """The revision that every read of this view sees."""
        return self._snapshot._revision

    @property
    def incarnation(self) -> str:
        """The label of the history that the revision belongs to."""
        return self._snapshot._incarnation

    @property
    def origin(self) -> str:
        """The tier its snapshot came from: `etcd`, `redis`, `sqlite`, `memory`, `disk` or `none`."""
        return self._snapshot._origin

    @property
    def age_s(self) -> float:
        """Seconds since its snapshot was last proved current; `inf` before that. Goes on ticking."""
        return self._age()

    def _age(self) -> float:
        at_s = self._snapshot._proof.at_s
        return math.inf if at_s == -math.inf else max(0.0, self._views.clock() - at_s)

    @property
    def stale(self) -> bool:
        """Whether `age_s` is beyond the client's `max_age_s`."""
        return self.age_s > self._views.max_age_s

    def renew(self) -> View:
        """A new view with the same layers and overrides, pinned now: for long streams and websockets.

        Overrides of the process are as they are now.
        """
        return self._views.view(self._request_layers, self._own)

    # Freshness. What is too old is looked for where a memo has nothing: memos forget as they become too old.

    def _usable(self, names: tuple[str, ...]) -> Iterable[str]:
        """Those of the store's keys that may be read; raises `StaleRead` once it comes to one that is to fail."""
        rules = self._views.freshness
        return names if rules is None else self._fresh(names, rules)

    def _fresh(self, names: tuple[str, ...], rules: FreshnessRules) -> Iterator[str]:
        age_s = self._age()
        for name in names:
            rule = rules.of(name)
            if rule is None or age_s <= rule.max_age_s:
                yield name
            elif rule.on_stale == "fail":
                raise self._too_old(repr(name), rule, age_s)

    def _is_too_old(self, name: str) -> bool:
        """Whether a key of the store is older than it may be."""
        rules = self._views.freshness
        rule = None if rules is None else rules.of(name)
        return rule is not None and self._age() > rule.max_age_s

    def _below(self, region: str, *, rejected: bool = False) -> Iterable[tuple[Any, ...]]:
        """The store's entries below a prefix, or its rejections there, that may be read; raises `StaleRead`."""
        rules, passed = self._views.freshness, self._passed_over(region)
        if passed and rules is not None and rules.of(region) in passed and not rules.divides(region):
            return ()  # also where it lies in a lazy unit that is not loaded
        holder = self._holder(region)
        found: Iterable[tuple[Any, ...]] = (holder._rejected if rejected else holder).below(region)
        return (item for item in found if rules.of(item[0]) not in passed) if passed and rules is not None else found

    def _passed_over(self, region: str) -> tuple[Freshness, ...]:
        """The rules whose keys below a prefix are too old to be there; raises `StaleRead` where they are to fail."""
        rules = self._views.freshness
        if rules is None or self._snapshot._origin == "none":
            return ()
        age_s = self._age()
        passed = tuple(rule for rule in rules.within(region) if age_s > rule.max_age_s)
        for rule in passed:
            if rule.on_stale == "fail":
                raise self._too_old(f"all below {rule.prefix!r}", rule, age_s)
        return passed

    def _too_old(self, what: str, rule: Freshness, age_s: float) -> StaleRead:
        views = self._views
        views.stale_reads += 1
        was = "never proved current" if age_s == math.inf else f"last proved current {ago(age_s)}"
        if views.base._age() <= rule.max_age_s:
            remedy = "renew the view: the newest one is fresh"
        else:
            reason = views.trouble()
            remedy = "wait until the store confirms it" + (f" ({reason})" if reason else "")
        return StaleRead(f"{what} was {was}, and {rule.prefix!r} allows {rule.max_age_s:g} s: {remedy}")

    def _limit_of(self, key: str) -> float:
        """The age up to which what was read at `key` may be remembered; 0: not at all."""
        rules = self._views.freshness
        if rules is None or key in self._overrides:
            return math.inf
        return self._limit(rules.of(name) for name in self._names(key))

    def _limit_of_section(self, prefix: str) -> float:
        rules = self._views.freshness
        if rules is None:
            return math.inf
        return self._limit(rule for region in self._names(prefix) for rule in rules.within(region))

    def _limit_of_derived(self, derived: Derived) -> float:
        if self._memo is None:
            return math.inf
        if derived.alone:
            return derived.limit_s
        limits = (*map(self._limit_of, derived.keys), *map(self._limit_of_section, derived.sections))
        return min(limits, default=math.inf)

    def _count_too_old(self) -> int:
        """How many of the rules refuse what this view has."""
        rules = self._views.freshness
        if rules is None:
            return 0
        age_s = self._age()
        return sum(age_s > rule.max_age_s for rule in rules.within(""))

    def _limit(self, rules: Iterable[Freshness | None]) -> float:
        limit_s = min((rule.max_age_s for rule in rules if rule is not None), default=math.inf)
        if limit_s == math.inf:
            return limit_s
        lapses = self._views.lapses
        return limit_s if lapses is not None and lapses.running and self._age() <= limit_s else 0.0

    def _remember_until(self, limit_s: float) -> None:
        """See to it that what was just put into a memo is forgotten at this age."""
        if self._memo is not None and limit_s < math.inf and self._views.lapses is not None:
            self._views.lapses.keep(self._memo, limit_s)

    # Lazy units

    def fetch(self, key: str, default: Any = MISSING, timeout_s: float | None = None) -> Any:
        """The value of `key`, also below a lazy prefix: its unit is read from the store, unless it is held here.

        From then on all keys of that unit can be read by `[]`, `get` and `section`. As of this view's revision, like
        every read of it. Waits for at most `timeout_s` (the client's `fetch_timeout_s`). A key that is not lazy, in no
        layer either, is simply read.

        Raises what `[]` does (`default`, if given, takes the place of `KeyMissing` alone); `StoreUnavailable` (retry)
        when there is no answer in time; `Overloaded` (retry later) beyond the rate of misses that protects the store;
        `Compacted` (`renew` the view) when the history that the view is of is no longer kept; `InvalidKey`;
        `InvalidValue` when the unit is beyond its bounds.
        """
        self._load(self._wanted((key,)), timeout_s)
        return self._fetched(key, default)

    def fetch_many(self, keys: Iterable[str], timeout_s: float | None = None) -> dict[str, Any]:
        """The values of those of `keys` that there are, by key, as `fetch` gives them; their units are read at once."""
        keys = _many(keys)
        self._load(self._wanted(keys), timeout_s)
        return {key: value for key in keys if (value := self._read(key)) is not MISSING}

    async def afetch(self, key: str, default: Any = MISSING, timeout_s: float | None = None) -> Any:
        """`fetch` without blocking the event loop."""
        await self._aload(self._wanted((key,)), timeout_s)
        return self._fetched(key, default)

    async def afetch_many(self, keys: Iterable[str], timeout_s: float | None = None) -> dict[str, Any]:
        """`fetch_many` without blocking the event loop."""
        keys = _many(keys)
        await self._aload(self._wanted(keys), timeout_s)
        return {key: value for key in keys if (value := self._read(key)) is not MISSING}

    def _fetched(self, key: str, default: Any) -> Any:
        return self[key] if default is MISSING else self.get(key, default)

    def _wanted(self, keys: Iterable[str]) -> list[str]:
        """The units that reading `keys` needs, and that this view does not have. Raises `InvalidKey`."""
        lazy, wanted = self._views.lazy, dict[str, None]()
        for key in keys:
            check_key(key)
            if key in self._overrides:
                continue
            for name in self._names(key):
                unit = unit_of(name, lazy)
                if unit and not isinstance(self._units.get(unit), Snapshot) and not self._is_too_old(name):
                    wanted[unit] = None
        return list(wanted)

    def _load(self, wanted: list[str], timeout_s: float | None) -> None:
        """Load units. Raises the first error, once all have come or failed."""
        if wanted and (reader := self._reader()) is not None:
            self._take_units(reader.load(wanted, self._snapshot, timeout_s, self._trace()))

    async def _aload(self, wanted: list[str], timeout_s: float | None) -> None:
        if wanted and (reader := self._reader()) is not None:
            self._take_units(await reader.aload(wanted, self._snapshot, timeout_s, self._trace()))

    def _prefetch(self, keys: Iterable[str]) -> None:
        """Load the units of the layers and of `keys`, at once; what cannot be loaded is told where it is read.

        Raises `InvalidKey`.
        """
        wanted, reader = self._wanted_by_request(keys), self._reader()
        if wanted and reader is not None:
            self._keep_all(reader.load(wanted, self._snapshot, context=self._trace()))

    async def _aprefetch(self, keys: Iterable[str]) -> None:
        """`_prefetch` without blocking the event loop."""
        wanted, reader = self._wanted_by_request(keys), self._reader()
        if wanted and reader is not None:
            self._keep_all(await reader.aload(wanted, self._snapshot, context=self._trace()))

    def _wanted_by_request(self, keys: Iterable[str]) -> list[str]:
        layers = (unit_of(layer, self._views.lazy) for layer in self._layers)
        wanted = [unit for unit in layers if unit and not isinstance(self._units.get(unit), Snapshot)]
        return list(dict.fromkeys((*wanted, *self._wanted(keys))))

    def _trace(self) -> Context | None:
        """OpenTelemetry's context that its waits belong to; None for the current one."""
        return None

    def _reader(self) -> UnitReader | None:
        # Nothing was listed yet: reading raises `NotReady`, or finds a default.
        return None if self._snapshot._origin == "none" else self._views.reader

    def _take_units(self, loaded: Mapping[str, Snapshot | Exception]) -> None:
        self._keep_all(loaded)
        for found in loaded.values():
            if not isinstance(found, Snapshot):
                raise found

    def _keep_all(self, loaded: Mapping[str, Snapshot | Exception]) -> None:
        # What one call has loaded it may read, however many units they are.
        most = _UNITS + len(loaded) - 1
        for unit, found in loaded.items():
            self._keep(unit, found if isinstance(found, Snapshot) else str(found), most)

    # Sections, models, derived values

    def section(self, prefix: str) -> Section:
        """The mapping below `prefix` (which ends with '/'), the prefix cut off. Costs its own size, once a view.

        Of a view with layers of a request or with overrides, sections of more than 256 keys are not kept, and cost
        that each time. Raises `InvalidKey` for what is no prefix, `StaleRead` where some of it is older than it may be,
        `NotReady` when nothing was listed yet and neither defaults nor overrides have a key below it.
        """
        return self._section(check_prefix(prefix))

    def _section(self, prefix: str) -> Section:
        section = self._sections.get(prefix)
        if section is None:
            section = self._make_section(prefix)
            limit_s = self._limit_of_section(prefix)
            if limit_s <= 0:
                return section
            kept = self._sections
            if len(kept) >= _SECTIONS or not (
                self._is_base or len(section) + sum(len(other) for other in list(kept.values())) <= _KEPT_ENTRIES
            ):
                kept.clear()
            if self._is_base or len(section) <= _KEPT_ENTRIES:
                kept[prefix] = section
                self._remember_until(limit_s)
        return section

    def _make_section(self, prefix: str) -> Section:
        snapshot, cut = self._snapshot, len(prefix)
        found = {key[cut:]: value for key, value in self._views.defaults.items() if key.startswith(prefix)}
        for layer in ("", *reversed(self._layers)):
            start = len(layer) + cut
            found.update({item[0][start:]: item[1] for item in self._below(layer + prefix)})
        found.update({key[cut:]: value for key, value in self._overrides.items() if key.startswith(prefix)})
        held: dict[str, HeldBack] = {}
        for layer in (*self._layers, "") if snapshot._rejected or self._views.lazy else ():
            start = len(layer) + cut
            for name, why in self._below(layer + prefix, rejected=True):
                key = name[start:]
                if key not in found and key not in held and not why.deleted:
                    held[key] = HeldBack(f"{name!r} is held back: revision {why.revision} was rejected ({why.reason})")
        unready = ""
        if snapshot._origin == "none":
            if not found:
                raise self._not_ready(prefix)
            unready = str(self._not_ready(prefix))
        return Section(prefix, found, held, unready)

    @overload
    def bind(self, model: type[Model], prefix: str) -> Model: ...
    @overload
    def bind(self, model: Any, prefix: str) -> Any: ...
    def bind(self, model: Any, prefix: str) -> Any:
        """The keys below `prefix` (or one key, without the trailing '/') as `model`, typed and validated.

        `model` is a dataclass, a msgspec.Struct, a pydantic model or a JSON Schema. Done once per change of what it
        read; the result is shared by requests, so give it a frozen model. Raises `InvalidValue` that names the key,
        and what reading raises.
        """
        try:
            hash(model)
            name = ("bind", model, prefix)
        except TypeError:
            name = ("bind", id(model), prefix)

        def build(view: View) -> Any:
            from veltrix_mw import validation

            if prefix.endswith("/"):
                section = view.section(prefix)
                if section._unready:
                    raise NotReady(section._unready)  # it reads all keys there, and what defaults have is not all
                for held in section._held.values():
                    raise HeldBack(str(held))
                return validation.bind(model, prefix, section)
            key = check_key(prefix)
            value = view._read(key)
            return validation.bind(model, key, {} if value is MISSING else {"": value})

        return self._derive(name, build, model).result

    def derive(self, fn: Callable[[View], T]) -> T:
        """`fn(view)`, computed once per change of the keys that it read, and shared by requests and threads.

        Pass the same function each time (one defined at module level): it is the name that the result is kept
        under. Raises what `fn` raises; nothing is kept then.
        """
        result: T = self._derive(fn, fn, fn).result
        return result

    def _derive(self, name: Any, fn: Callable[[View], Any], model: Any) -> Derived:
        derived = self._derived.get(name)
        if derived is not None:
            return derived
        shared = (name, self._request_layers)
        derived = self._views.derived.get(shared)
        if derived is None or not derived.holds_in(self):
            # Who asks when it is too old does not take what was begun while it was fresh.
            flight = (shared, id(self._snapshot), id(self._overrides), self._count_too_old())
            own: list[Derived] = []
            derived = self._views.flights.run(flight, lambda: self._compute(fn, model, own))
            if derived.alone and self._views.lazy and not own:
                derived = self._compute(fn, model)  # whose view that was may have lacked a unit that this one has
            if not derived.alone:
                self._views.derived.put(shared, derived)
            elif self._views.lazy:
                return derived  # it may be of a view that lacked a unit, and the memo is shared
        limit_s = self._limit_of_derived(derived)
        if limit_s > 0:
            if len(self._derived) >= MOST_DERIVED:
                self._derived.clear()
            self._derived[name] = derived
            self._remember_until(limit_s)
        return derived

    def _compute(self, fn: Callable[[View], Any], model: Any, computed: list[Derived] | None = None) -> Derived:
        derived = self._tracked(fn, model)
        if computed is not None:
            computed.append(derived)
        return derived

    def _tracked(self, fn: Callable[[View], Any], model: Any) -> Derived:
        tracking = self._as(_TrackingView)
        tracking._reads, tracking._read_sections, tracking._alone, tracking._limit_s = {}, {}, False, math.inf
        current = pinned_view.get(None)
        # What `fn` reads by way of current_view() is read from here too; a view of another client stays that.
        token = pinned_view.set(tracking) if current is None or current._views is self._views else None
        try:
            result = fn(tracking)
        finally:
            if token is not None:
                pinned_view.reset(token)
        limit_s = tracking._limit_s
        derived = Derived(result, tracking._reads, tracking._read_sections, model, tracking._alone, limit_s)
        # `fn` may have kept the view: what it reads later is nobody's dependency.
        tracking._reads, tracking._read_sections = {}, {}
        if derived.alone or not (self._is_base or derived.size <= _KEPT_ENTRIES):
            return Derived(result, {}, {}, model, alone=True, limit_s=limit_s)
        return derived

    def _read(self, key: str) -> Any:
        """The value of `key` or `MISSING`, by the public path, so that it is tracked."""
        return self.get(key, MISSING)


def _many(keys: Iterable[str]) -> tuple[str, ...]:
    if isinstance(keys, str):
        raise InvalidKey(f"keys are a sequence of keys; write ({keys!r},)")
    return tuple(keys)


def _check_held(holder: Snapshot, name: str) -> None:
    """Raise `HeldBack` where a key that has no value was rejected."""
    held = holder._rejected.get(name)
    if held is not None and not held.deleted:
        raise HeldBack(f"{name!r} is held back: revision {held.revision} was rejected ({held.reason})")


_V = TypeVar("_V", bound=View)


class _TrackingView(View):
    """A view that notes what is read from it, for `derive`."""

    __slots__ = ("_alone", "_limit_s", "_read_sections", "_reads")

    _alone: bool  # something was read that is of this view alone
    _limit_s: float  # the age up to which all that was read may be remembered
    _reads: dict[str, Any]
    _read_sections: dict[str, Section]

    def __getitem__(self, key: str) -> Any:
        value = self._noted(key)
        if value is MISSING:
            raise self._absent(key)
        return value

    def get(self, key: str, /, default: Any = None) -> Any:
        value = self._noted(key)
        return default if value is MISSING else value

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._noted(key) is not MISSING

    def _noted(self, key: str) -> Any:
        try:
            value = self._remembered(key)
        except (HeldBack, NotLoaded, NotReady, StaleRead):
            self._alone = True  # `fn` may catch it, and that must not outlive its cause
            raise
        finally:
            if self._memo is not None and isinstance(key, str):
                self._limit_s = min(self._limit_s, self._limit_of(key))
        if isinstance(key, str):
            self._reads[key] = value
        return value

    def _section(self, prefix: str) -> Section:
        try:
            section = self._read_sections[prefix] = super()._section(prefix)
        except (NotLoaded, NotReady, StaleRead):
            self._alone = True
            raise
        finally:
            if self._memo is not None:
                self._limit_s = min(self._limit_s, self._limit_of_section(prefix))
        return section

    @property
    def revision(self) -> int:
        self._alone = True
        return super().revision

    @property
    def incarnation(self) -> str:
        self._alone = True
        return super().incarnation

    @property
    def origin(self) -> str:
        self._alone = True
        return super().origin

    @property
    def age_s(self) -> float:
        self._alone = True
        return super().age_s

    def renew(self) -> View:
        self._alone = True
        return super().renew()

    def _all_keys(self) -> tuple[str, ...]:
        self._section("")
        return super()._all_keys()

    def _derive(self, name: Any, fn: Callable[[View], Any], model: Any) -> Derived:
        try:
            derived = super()._derive(name, fn, model)
        except Exception:
            self._alone, self._limit_s = True, 0.0  # what was read within is not known here
            raise
        self._reads.update(derived.keys)
        self._read_sections.update(derived.sections)
        self._alone = self._alone or derived.alone
        self._limit_s = min(self._limit_s, self._limit_of_derived(derived))
        return derived
