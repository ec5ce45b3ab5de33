"""The embedded corpus of many languages: phrases out of the Unicode CLDR tables that `babel` carries."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lmexp.contracts import Split, UserError
from lmexp.corpus.content import split_of, splits_of
from lmexp.corpus.parts import Part, Parted, check_alpha, check_languages, did_you_mean, pair, single

if TYPE_CHECKING:
    from babel import Locale
    from datasets import Dataset

_VERSION = 1  # of how lines are made below; a change makes new fingerprints
_NO_TERRITORIES = {"EZ", "QO", "UN", "XA", "XB", "ZZ"}
_NO_LANGUAGES = {"mis", "mul", "root", "und", "zxx"}
_NO_SCRIPTS = {"Zinh", "Zmth", "Zsye", "Zsym", "Zxxx", "Zyyy", "Zzzz"}
_LEAST = {"territories": 240, "languages": 150, "currencies": 150, "scripts": 40, "units": 60}
"""Names that a language must have."""

Phrase = tuple[Any, ...]
"""A kind and its arguments, which may be phrases: `("about", ("territory", "PE"), ("unit", 25, "length-meter"))`."""


@dataclass
class Cldr(Parted):
    """Lines such as `Peru (Spanish and Quechua): 1,234.50 Peruvian soles`, the same in each language.

    They name territories, cities, languages, scripts, currencies and units with their plural forms, in lists, beside
    dates, times, numbers and amounts, each as its language writes them. What a line says is drawn from a fixed seed
    and then written in every language, so that line i of one is the translation of line i of another.

    A line goes to a split by the hash of the names in it, whatever it says of them; one that reads like a line of
    another split in any of the languages is not made. What a part holds depends on all of `languages`: names are used
    that all have.
    """

    languages: tuple[str, ...] = ("en", "de", "fr", "es", "it", "nl", "ru", "ar", "zh", "ja")
    """Tags that `babel` knows, such as `en` or `zh_Hant`."""

    pairs: tuple[tuple[str, str], ...] = ()
    """Two languages each: parts that hold a text beside its translation."""

    monolingual: bool = True
    """Whether each language is a part of its own, too."""

    phrases: int = 20_000
    """Lines in each language, those of all splits together; at least 100."""

    validation: float = 0.05
    """Fraction of the lines in the validation split, about; in [0, 1)."""

    test: float = 0.05
    """Fraction of the lines in the test split, about; in [0, 1), below 1 with `validation`."""

    alpha: float = 0.7
    """Parts are drawn in proportion to their tokens to this power; in [0, 1], 1: as they are."""

    def __post_init__(self) -> None:
        self.languages = check_languages(self.languages or (), 1)
        self.pairs = tuple(self._checked_pair(two) for two in self.pairs or ())
        if not self.monolingual:
            paired = {language for two in self.pairs for language in two}
            for language in self.languages:
                if language not in paired:
                    raise UserError(
                        f"corpus.languages names {language!r}, which has no text: it is in none of corpus.pairs and "
                        "corpus.monolingual is false. Leave it out, add a pair: data.corpus.pairs=[[en,de]], or set "
                        "data.corpus.monolingual=true."
                    )
        if not isinstance(self.phrases, int) or self.phrases < 100:
            raise UserError(f"corpus.phrases={self.phrases}; expected a whole number of at least 100.")
        if min(self.validation, self.test) < 0 or self.validation + self.test >= 1:
            raise UserError(
                f"corpus.validation={self.validation} and corpus.test={self.test}: expected fractions from 0 on that "
                "leave something to train on; for example corpus.validation=0.05 corpus.test=0.05."
            )
        check_alpha(self.alpha)
        for language in self.languages:
            if missing := _missing(_locale(language)):
                raise UserError(
                    f"corpus.languages: babel knows {language!r}, but has too little text in it ({missing}); choose "
                    "another, such as en, de, fr, es, pt, ru, tr, ar, hi, zh or ja."
                )

    def _checked_pair(self, two: Sequence[str]) -> tuple[str, str]:
        if isinstance(two, str) or len(two) != 2 or two[0] == two[1]:
            raise UserError(
                f"corpus.pairs: {two}; expected two languages for each: data.corpus.pairs=[[en,de],[en,fr]]."
            )
        for language in two:
            if language not in self.languages:
                raise UserError(
                    f"corpus.pairs: {list(two)} has {language!r}, which is not in corpus.languages; add it there."
                )
        if [tuple(other) for other in self.pairs].count(tuple(two)) > 1:
            raise UserError(f"corpus.pairs has {list(two)} twice; leave one of them out.")
        return two[0], two[1]

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits there are."""
        return splits_of(self.validation, self.test)

    def parts(self) -> list[Part]:
        """Each language alone, unless `monolingual` is false, then the pairs."""
        singles = [single(self, language) for language in self.languages] if self.monolingual else []
        return singles + [pair(self, *two) for two in self.pairs]

    def content_fingerprint(self) -> str:
        """sha256 over the version of `babel` and all that the lines depend on."""
        import babel

        made_of = [_VERSION, babel.__version__, self.languages, self.phrases, self.validation, self.test]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()

    def left_out(self, split: Split, language: str, beside: tuple[str, ...]) -> int:
        """None: no row lacks a text."""
        return 0

    def rows_in(self, split: Split, language: str, beside: tuple[str, ...]) -> Dataset:
        """The lines of a split in a language; none is empty in any."""
        from datasets import Dataset

        if split not in self.splits:
            raise UserError(f"Cldr has no {split} split; it has {', '.join(self.splits)}. Set corpus.{split}=0.05.")
        texts = self.lines[split][language]
        if not texts:
            raise UserError(
                f"None of corpus.phrases={self.phrases} lines falls into the {split} split; expected at least one. Set "
                f"data.corpus.phrases=20000, or a larger data.corpus.{split}."
            )
        return Dataset.from_dict({"text": texts})

    @cached_property
    def lines(self) -> dict[Split, dict[str, list[str]]]:
        """split -> language -> lines, made at first use."""
        writers = {language: Writer(_locale(language)) for language in self.languages}
        lines: dict[Split, dict[str, list[str]]] = {s: {name: [] for name in writers} for s in self.splits}
        homes: dict[str, dict[str, Split]] = {name: {} for name in writers}  # language -> text -> its split
        drawn: set[Phrase] = set()
        made = 0
        for phrase in _phrases(Names.of(list(writers.values()))):
            if phrase in drawn:
                continue
            drawn.add(phrase)
            split = self._split_of(phrase)
            texts = {name: write(phrase) for name, write in writers.items()}
            if any(homes[name].setdefault(text, split) != split for name, text in texts.items()):
                continue
            for name, text in texts.items():
                lines[split][name].append(text)
            made += 1
            if made == self.phrases:
                break
        return lines

    def _split_of(self, phrase: Phrase) -> Split:
        group = json.dumps(sorted(names_in(phrase)))
        return split_of(group, self.validation, self.test)


def names_in(phrase: Phrase) -> set[str]:
    """The names that a phrase says something of: its content without numbers, dates and form."""
    kind, *arguments = phrase
    if kind in ("territory", "language", "script", "currency", "city"):
        return {f"{kind} {arguments[0]}"}
    if kind in ("unit", "money"):
        return {f"{'currency' if kind == 'money' else kind} {arguments[1]}"}
    return {name for inner in arguments if isinstance(inner, tuple) for name in names_in(inner)}


class Writer:
    """Writes phrases in one language."""

    def __init__(self, locale: Locale) -> None:
        from babel.core import get_global

        self.locale = locale
        self.territories = {c: n for c, n in locale.territories.items() if len(c) == 2 and c not in _NO_TERRITORIES}
        self.languages = {c: n for c, n in locale.languages.items() if "_" not in c and c not in _NO_LANGUAGES}
        self.scripts = {c: n for c, n in locale.scripts.items() if c not in _NO_SCRIPTS}
        self.currencies = dict(locale.currencies)
        self.units = dict(_units(locale))
        likely = get_global("likely_subtags").get(locale.language, "")
        self.cities = dict(_cities(locale, latin=(locale.script or likely[len(locale.language) + 1 :][:4]) == "Latn"))
        self._atoms: dict[str, Callable[..., str]] = {
            "territory": self.territories.__getitem__,
            "language": self.languages.__getitem__,
            "script": self.scripts.__getitem__,
            "currency": self.currencies.__getitem__,
            "city": self.cities.__getitem__,
            "date": self._date,
            "month": self._month,
            "dates": self._dates,
            "time": self._time,
            "ago": self._ago,
            "unit": self._unit,
            "money": self._money,
            "percent": self._percent,
            "number": self._number,
            "compact": self._compact,
        }

    def __call__(self, phrase: Phrase) -> str:
        """The text of a phrase."""
        from babel.lists import format_list

        kind, *arguments = phrase
        if kind in self._atoms:
            return self._atoms[kind](*arguments)
        texts = [self(inner) for inner in arguments]
        if kind in ("and", "or"):
            return format_list(texts, style="standard" if kind == "and" else "or", locale=self.locale)
        if kind == "of":
            return f"{texts[0]} ({texts[1]})"
        return {"about": ": ", "then": "; ", "equal": " = "}[kind].join(texts)

    def _date(self, day: str, form: str) -> str:
        from babel.dates import format_date

        return format_date(date.fromisoformat(day), form, self.locale)  # type: ignore[arg-type, unused-ignore]

    def _month(self, day: str) -> str:
        from babel.dates import format_skeleton

        return format_skeleton("yMMMM", date.fromisoformat(day), locale=self.locale)  # type: ignore[arg-type, unused-ignore]

    def _dates(self, first: str, last: str) -> str:
        from babel.dates import format_interval

        return format_interval(date.fromisoformat(first), date.fromisoformat(last), "yMMMd", locale=self.locale)

    def _time(self, minutes: int) -> str:
        from babel.dates import format_time

        return format_time(time(*divmod(minutes, 60)), "short", locale=self.locale)

    def _ago(self, seconds: int) -> str:
        from babel.dates import format_timedelta

        return format_timedelta(timedelta(seconds=seconds), add_direction=True, locale=self.locale)

    def _unit(self, value: float, unit: str) -> str:
        # babel's own format_unit writes the unit's identifier where CLDR takes long forms from the short ones
        forms = self.units[unit]
        return forms.get(self.locale.plural_form(value), forms["other"]).format(self._number(value))

    def _money(self, amount: float, currency: str, form: str) -> str:
        from babel.numbers import format_currency

        return format_currency(amount, currency, locale=self.locale, format_type=form)  # type: ignore[arg-type]

    def _percent(self, value: int) -> str:
        from babel.numbers import format_percent

        return format_percent(value / 100, locale=self.locale)

    def _number(self, value: float) -> str:
        from babel.numbers import format_decimal

        return format_decimal(value, locale=self.locale)

    def _compact(self, value: int) -> str:
        from babel.numbers import format_compact_decimal

        return format_compact_decimal(value, fraction_digits=2, locale=self.locale)


@dataclass(frozen=True)
class Names:
    """What lines can name: what all languages have names for, sorted."""

    territories: list[str]
    languages: list[str]
    scripts: list[str]
    currencies: list[str]
    """Today's and those of old."""

    tenders: list[str]
    """Today's alone."""

    units: list[str]
    cities: list[str]

    money: dict[str, str]
    """Territory -> its currency."""

    spoken: dict[str, list[str]]
    """Territory -> its official languages."""

    land: dict[str, str]
    """City -> its territory."""

    @classmethod
    def of(cls, writers: Sequence[Writer]) -> Names:
        """Of these languages."""
        from babel.core import get_global
        from babel.languages import get_official_languages

        def common(kind: str) -> list[str]:
            return sorted(set.intersection(*(set(getattr(writer, kind)) for writer in writers)))

        territories, languages, currencies, cities = map(common, ("territories", "languages", "currencies", "cities"))
        money: dict[str, str] = {}
        for territory in territories:
            valid = [
                currency
                for currency, _, end, tender in get_global("territory_currencies").get(territory, ())
                if tender and end is None and currency in currencies
            ]
            if valid:
                money[territory] = valid[0]
        official = {t: [lang for lang in get_official_languages(t) if lang in languages][:3] for t in territories}
        spoken = {territory: names for territory, names in official.items() if names}
        zones = get_global("zone_territories")
        land = {city: zones[city] for city in cities if zones[city] in territories}
        tenders = sorted(set(money.values()))
        return cls(
            territories,
            languages,
            common("scripts"),
            currencies,
            tenders,
            common("units"),
            cities,
            money,
            spoken,
            land,
        )


def available() -> list[str]:
    """The languages without a script or territory that there is enough text for."""
    from babel import localedata

    return sorted(name for name in localedata.locale_identifiers() if "_" not in name and not _missing(_locale(name)))


def _locale(language: str) -> Locale:
    from babel import Locale, UnknownLocaleError, localedata

    try:
        return Locale.parse(str(language).replace("-", "_"))
    except (UnknownLocaleError, ValueError) as error:
        known = Locale("en").languages
        tags = {str(name).lower(): tag for tag, name in known.items()}
        named = tags.get(str(language).lower())
        meant = f" Did you mean {named!r}?" if named else did_you_mean(language, localedata.locale_identifiers())
        raise UserError(
            f"corpus.languages: babel knows no language {language!r}; expected a tag such as en or zh_Hant.{meant}"
        ) from error


def _missing(locale: Locale) -> str:
    """What a language has too few names of; empty if nothing."""
    counts = {
        "territories": sum(len(str(code)) == 2 for code in locale.territories),
        "languages": len(locale.languages),
        "currencies": len(locale.currencies),
        "scripts": len(locale.scripts),
        "units": sum(1 for _ in _units(locale)),
    }
    return ", ".join(f"{n} {kind} of at least {_LEAST[kind]}" for kind, n in counts.items() if n < _LEAST[kind])


def _units(locale: Locale) -> Iterator[tuple[str, dict[str, str]]]:
    """(unit, its plural forms): the long ones, or the short ones where CLDR takes these for long."""
    for unit, lengths in locale._data["unit_patterns"].items():  # babel has no public way to them
        for length in ("long", "short"):
            forms = lengths.get(length, {})
            if "other" in forms and not unit.endswith("-person"):
                yield unit, dict(forms)
                break


def _cities(locale: Locale, latin: bool) -> Iterator[tuple[str, str]]:
    """(time zone, the city it is named after). CLDR leaves out a name that is that of the zone, which is in Latin."""
    from babel.core import get_global

    for zone in get_global("zone_territories"):
        name = locale.time_zones.get(zone, {}).get("city")
        if name or latin:
            yield zone, name or zone.rpartition("/")[2].replace("_", " ")


def _phrases(names: Names) -> Iterator[Phrase]:
    """Phrases without end, some more than once, from a fixed seed."""
    draw = _Draw(names)
    kinds = (
        draw.prices,
        draw.events,
        draw.lists,
        draw.measures,
        draw.journeys,
        draw.exchanges,
        draw.statistics,
        draw.sayings,
        draw.stays,
    )
    while True:
        for kind in kinds:
            yield kind()


class _Draw:
    """Draws one phrase of a kind after the other."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self._random = random.Random(0).random  # the one method that Python promises to keep for a seed

    def prices(self) -> Phrase:
        """Peru (Spanish and Quechua): 1,234.50 Peruvian soles"""
        territory = self._one(list(self.names.money))
        spoken = self.names.spoken.get(territory)
        subject: Phrase = ("territory", territory)
        if spoken and self._chance():
            subject = ("of", subject, ("and", *(("language", name) for name in spoken)))
        price = self._money(self.names.money[territory])
        if self._chance():
            return ("about", subject, price)
        return ("about", subject, ("equal", self._unit(), price))

    def events(self) -> Phrase:
        """Lima (Peru): Monday, March 3, 2014; 5:30 PM"""
        when: Phrase = ("date", self._day(), self._one(["full", "long", "medium"]))
        if self._chance():
            when = ("then", when, ("time", self._whole(288) * 5))
        if self._chance(0.3):
            when = ("then", when, self._ago())
        return ("about", self._place(), when)

    def lists(self) -> Phrase:
        """Peru, Chile, and Brazil"""
        kind, codes = self._one(
            [
                ("territory", self.names.territories),
                ("language", self.names.languages),
                ("city", self.names.cities),
                ("currency", self.names.currencies),
                ("script", self.names.scripts),
            ]
        )
        return (self._one(["and", "and", "or"]), *((kind, code) for code in self._some(codes, 2, 5)))

    def measures(self) -> Phrase:
        """Peru: 25 kilometers, 3 hours, and 20 liters"""
        measured = self._units(1, 3)
        return ("about", ("territory", self._one(self.names.territories)), ("and", *measured))

    def journeys(self) -> Phrase:
        """Lima and Paris: 25 kilometers; in 3 hours"""
        cities = ("and", *(("city", city) for city in self._some(self.names.cities, 2, 3)))
        return ("about", cities, ("then", self._unit(), self._ago()))

    def exchanges(self) -> Phrase:
        """€12.00 = 14.50 US dollars"""
        return ("equal", *(self._money(currency) for currency in self._some(self.names.tenders, 2, 2)))

    def statistics(self) -> Phrase:
        """Spanish and Quechua: 45%; 12M"""
        kind, codes = self._one([("language", self.names.languages), ("territory", self.names.territories)])
        subject = ("and", *((kind, code) for code in self._some(codes, 1, 3)))
        number = self._one(
            [
                ("number", self._whole(100_000)),
                ("number", self._whole(10_000) / 100),
                ("compact", (1 + self._whole(99)) * 10 ** (3 + self._whole(6))),
            ]
        )
        return ("about", subject, ("then", ("percent", self._whole(101)), number))

    def sayings(self) -> Phrase:
        """Spanish (Peru), French (Canada), and Uzbek (Cyrillic)"""
        said: list[Phrase] = []
        for language in self._some(self.names.languages, 1, 3):
            inside = self._one([("territory", self.names.territories), ("script", self.names.scripts)])
            said.append(("of", ("language", language), (inside[0], self._one(inside[1]))))
        return ("and", *said)

    def stays(self) -> Phrase:
        """Lima (Peru): Mar 3 – May 7, 2014"""
        first = self._day()
        last = (date.fromisoformat(first) + timedelta(days=1 + self._whole(90))).isoformat()
        return ("about", self._place(), ("month", first) if self._chance(0.25) else ("dates", first, last))

    def _place(self) -> Phrase:
        """A city and its territory, or a territory and a language of it."""
        if self._chance() and self.names.land:
            city = self._one(list(self.names.land))
            return ("of", ("city", city), ("territory", self.names.land[city]))
        territory = self._one(list(self.names.spoken))
        return ("of", ("territory", territory), ("language", self._one(self.names.spoken[territory])))

    def _unit(self) -> Phrase:
        return self._units(1, 1)[0]

    def _units(self, least: int, most: int) -> list[Phrase]:
        return [
            ("unit", self._whole(100) if self._chance(0.8) else self._whole(100) / 10, unit)
            for unit in self._some(self.names.units, least, most)
        ]

    def _money(self, currency: str) -> Phrase:
        amount = self._whole(1000) if self._chance() else self._whole(1_000_000) / 100
        return ("money", amount, currency, self._one(["standard", "name"]))

    def _ago(self) -> Phrase:
        # each with less than the next unit, in which babel would say it
        seconds, most = self._one(
            [(1, 50), (60, 50), (3600, 20), (86_400, 5), (604_800, 3), (2_592_000, 10), (31_536_000, 100)]
        )
        return ("ago", (1 + self._whole(most)) * seconds * self._one([1, -1]))

    def _day(self) -> str:
        return date.fromordinal(date(1950, 1, 1).toordinal() + self._whole(36_525)).isoformat()

    def _chance(self, probability: float = 0.5) -> bool:
        return self._random() < probability

    def _whole(self, end: int) -> int:
        return int(self._random() * end)

    def _one(self, among: Sequence[Any]) -> Any:
        return among[self._whole(len(among))]

    def _some(self, among: Sequence[str], least: int, most: int) -> list[str]:
        """Different ones, `least` to `most` of them."""
        count = least + self._whole(most - least + 1)
        chosen: dict[str, None] = {}
        while len(chosen) < count:
            chosen[self._one(among)] = None
        return list(chosen)
