"""The embedded labelled corpus: synthetic product reviews, each negative or positive by a grammar.

The data are SYNTHETIC: no one wrote these reviews, and a score on them says nothing of opinions in the wild. They are
a controlled test of what a classifier composes and of what it knew before, and need no network.

A review is one to three sentences: an opinion, at times a second one of the same polarity, and around them sentences
that say nothing of the product's worth. An opinion is a template filled with words. `{J+}` is an adjective of the
polarity of the whole, `{J-}` one of the other, so that a template is negative or positive with its words. The rules:

- plain: the words decide, and words of degree ("very", "absolutely", "slightly") change nothing;
- negation: "not", "never", "hardly", "nothing", "neither", "far from" and the like turn what they bear on, so that
  "The kettle is not noisy" is positive, as everywhere here: there is no third label;
- contrast: what follows "but", "yet", "still" or "however" decides, or the clause that has no "although", "while" or
  "despite";
- comparison: the product under review is meant; "less" turns, "more" and "better" do not; "never" before a
  comparative ("I have never had a more elegant kettle") does not.

Accuracy on the three groups of the test split, where 50 % is chance in each:

- `sentences`: known templates and words in opinions that training has not. A bag of words gets 60 %, as a word counts
  for either label by what stands around it. It tells that a model learned the grammar, and not that it reads English.
- `templates`: constructions that training has not, of words that it has. It tells whether the rules carry over to
  other frames of the same cues; a two-layer encoder trained on the defaults alone got 94 %. It tells nothing of cues
  that training lacks.
- `words`: known templates whose words of sentiment training lacks, down to their last word. Nothing in the training
  split says what they mean, so a model trained on it alone is at chance, up to what word parts give away; the rest is
  what pretraining knew of about 50 everyday words. It does not measure pretraining beyond these.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from lmexp.contracts import Split, UserError

if TYPE_CHECKING:
    from datasets import Dataset

_T = TypeVar("_T")

_VERSION = 2  # of the grammar and the drawing; a change makes new fingerprints

PLAIN = (
    "{s} {b} {J+}",
    "{s} {b} {i} {J+}",
    "{s} {g} {b} {J+}",
    "{s} {b} {e} {X+}",
    "{s} looks {J+} and feels {J+}",
    "I {V+} {s}",
    "I {g} {V+} {s}",
    "I am {f} {F+} with {s}",
    "I was {g} {F+} with {s}",
    "I find {s} {i} {J+}",
    "I would {g} call {s} {J+}",
    "I think that {s} {b} {J+}",
    "everybody finds {s} {J+}",
    "everybody says that {s} {b} {J+}",
    "everybody at home is {F+} with {s}",
    "everything about {s} {b} {J+}",
    "both the {a} and the {a} are {X+}",
    "{d} {n} is a {N+}",
    "{d} {n} is {g} a {N+}",
    "{d} {n} {P+}",
    "{d} {n} {g} {P+}",
    "it is such a {J+} {n}",
    "this is a {e} {X+} {n}",
)
NEGATION = (
    "{s} is not {J-}",
    "{s} is not {J-} at all",
    "{s} is not {J-} but {J+}",
    "{s} is {h} {J-}",
    "{s} {h} {b} {J-}",
    "{s} {b} far from {J-}",
    "{s} {b} far from {J-}: it {b} {J+}",
    "{s} {b} anything but {J-}",
    "neither the {a} nor the {a} {b} {J-}",
    "nothing about {s} {b} {J-}",
    "there is nothing {J-} about {s}",
    "there is nothing about {s} that I {V-}",
    "I cannot say that I {V-} {s}",
    "I am not {F-} with {s}",
    "I was {h} {F-} with {s}",
    "I would not call {s} {J-}",
    "I would {h} call {s} {J-}",
    "I do not think that {s} {b} {J-}",
    "I {h} think that {s} {b} {J-}",
    "nobody finds {s} {J-}",
    "nobody says that {s} {b} {J-}",
    "nobody at home is {F-} with {s}",
    "{d} {n} is {h} a {N-}",
    "{d} {n} {h} {P-}",
)
COMPARISON = (
    "{d} {n} {b} {m} more {J+} than {o}",
    "{d} {n} {b} {m} less {J-} than {o}",
    "{d} {n} {b} {m} {C+} than {o}",
    "{o} {b} {m} more {J-} than {t}",
    "{o} {b} {m} less {J+} than {t}",
    "{o} {b} {m} {C-} than {t}",
    "I find {d} {n} {m} more {J+} than {o}",
    "I find {o} {m} more {J-} than {t}",
    "I find {o} {m} less {J+} than {t}",
    "{d} {n} is not as {J-} as {o}",
    "{o} is not as {J+} as {t}",
    "compared with {o}, {d} {n} {b} {J+}",
    "{o} {b} {J-} compared with {t}",
    "I would rather have {R+} than {R-}",
    "I prefer {R+} to {R-}",
    "no other {n} is as {J+} as {t}",
    "no other {n} is {C+} than {t}",
    "I have never had a more {J+} {n}",
    "I have never had a {C+} {n}",
    "{s} could not be {C+}",
    "{s} could not be more {J+}",
    "the {a} {b} {m} {C+} than that of {o}",
    "the {a} {b} {m} less {J-} than that of {o}",
)
CONTRAST = (
    "{x-}, but {y+}",
    "{x-}. However, {y+}",
    "{x-}, yet {y+}",
    "{x-}; still, {y+}",
    "{x-} and {x-}, yet {y+}",
    "although {x-}, {y+}",
    "while {x-}, {y+}",
    "despite the {J-} {a}, {y+}",
    "despite the {J-} {a} and the {J-} {a}, {y+}",
    "{y+}, although {x-}",
    "{y+}, although {x-} and {x-}",
    "{y+}, even though {x-}",
    "{y+} despite the {J-} {a}",
    "{y+} in spite of the {J-} {a}",
    "I expected a {N-}, yet I am {F+}",
    "some people {V-} {d} {n}, but I {V+} it",
    "at first I was {F-} with {d} {n}, but now I am {F+}",
    "{x+}, and {y+}",
    "{x+} and {x+}, and {y+}",
)
"""`{x}` is a plain clause on an aspect of the product, `{y}` any of the three kinds above on it or an aspect."""

KNOWN = PLAIN + NEGATION + COMPARISON + CONTRAST
"""Templates of the training split; a template is named by itself."""

HELD_OUT = (
    "never was I {F-} with {s}",
    "by no means is {s} {J-}",
    "far from {J-}, {s} {b} {J+}",
    "{s} {b} neither {J-} nor {J-}",
    "I do not find {s} {J-}",
    "I {h} find {s} {J-}",
    "I would {h} call {d} {n} a {N-}",
    "nobody would call {s} {J-}",
    "nobody thinks that {s} {b} {J-}",
    "it is a {m} less {J-} {n} than {o}",
    "{o} is a {m} more {J-} {n} than {t}",
    "no other {n} could be more {J+} than {t}",
    "even though {x-}, {y+}",
    "although {x-} and {x-}, {y+}",
    "{x-} and {x-}, but {y+}",
    "{x-}. Still, {y+}",
    "in spite of the {J-} {a}, {y+}",
    "{y+} despite the {J-} {a} and the {J-} {a}",
)
"""Templates that only the test split's group `templates` has."""

Words = tuple[tuple[str, ...], tuple[str, ...]]
"""The negative ones and the positive ones."""


def _words(negative: str, positive: str) -> Words:
    return tuple(negative.split(", ")), tuple(positive.split(", "))


_RIVALS = ("the old one", "my last one", "the previous one", "the one at work", "the one that I had before")
WORDS: dict[str, Words] = {
    "J": _words(  # adjectives that have degrees and can be negated
        "annoying, awkward, boring, brittle, careless, clumsy, confusing, crude, cumbersome, disappointing, faulty, "
        "flimsy, fragile, frustrating, impractical, inconvenient, irritating, mediocre, messy, noisy, pointless, "
        "shoddy, sloppy, tacky, tedious, tiresome, troublesome, ugly, unpleasant, unreliable, unstable, useless",
        "appealing, attractive, capable, charming, clever, convincing, dependable, durable, effective, efficient, "
        "elegant, handy, helpful, impressive, intuitive, likeable, pleasant, polished, practical, precise, refined, "
        "reliable, robust, satisfying, sensible, solid, sturdy, stylish, tasteful, thoughtful, useful, versatile",
    ),
    "X": _words(  # extreme ones
        "abysmal, appalling, atrocious, awful, dismal, dreadful, ghastly, hideous, horrible, terrible",
        "amazing, brilliant, excellent, fantastic, magnificent, marvellous, outstanding, perfect, superb, wonderful",
    ),
    "N": _words(  # nouns
        "burden, disaster, disgrace, failure, headache, letdown, mistake, nuisance, waste of money",
        "bargain, gem, joy, masterpiece, pleasure, success, treat, triumph, winner",
    ),
    "V": _words(  # verbs after "I"
        "deplore, despise, detest, dislike, hate, loathe, regret, resent",
        "admire, adore, appreciate, enjoy, like, love, treasure, value",
    ),
    "F": _words(  # feelings
        "angry, annoyed, disappointed, displeased, dissatisfied, frustrated, irritated, unhappy",
        "content, delighted, enchanted, happy, impressed, pleased, satisfied, thrilled",
    ),
    "P": _words(  # verbs after "the product"
        "breaks, causes trouble, disappoints, fails, falls apart, gets in the way, goes wrong, lets me down, struggles",
        "delivers, does its job, excels, impresses, keeps its promises, lasts, saves time, shines, works well",
    ),
    "C": _words(
        "clumsier, poorer, rougher, uglier, weaker, worse",
        "better, finer, nicer, smarter, smoother, stronger",
    ),
    "R": ((*_RIVALS, "any other {n}"), ("this {n}", "this new {n}", "the new {n}")),  # what is worse or better to have
}
"""Kind -> words of sentiment that training has."""

NEW_WORDS: dict[str, Words] = {
    "J": _words(
        "defective, depressing, dodgy, dreary, grubby, lousy, nasty, pathetic, ridiculous, rotten, shabby, silly",
        "alluring, beautiful, classy, exquisite, heavenly, ingenious, inspiring, lovely, luxurious, rewarding, sleek, "
        "worthwhile",
    ),
    "X": _words("disgusting, revolting, vile, wretched", "gorgeous, splendid, stunning, terrific"),
    "N": _words("blunder, flop, nightmare", "blessing, godsend, jewel"),
    "V": _words("abhor, distrust", "applaud, cherish"),
    "F": _words("dismayed, fed up, upset", "ecstatic, overjoyed, smitten"),
    "P": _words("collapses, malfunctions", "astounds, dazzles"),
}
"""Kind -> words of sentiment that only the test split's group `words` has."""

_OTHERS = {
    "n": "air fryer, alarm clock, amplifier, backpack, bicycle, blender, bookshelf, calculator, camera, cooker, desk, "
    "dishwasher, doorbell, drill, drone, dryer, fan, freezer, fridge, grill, grinder, guitar, hairdryer, headset, "
    "heater, helmet, humidifier, iron, juicer, kettle, keyboard, lamp, lantern, laptop, microphone, microwave, mixer, "
    "monitor, mower, oven, phone, printer, projector, radio, razor, router, saw, scanner, scooter, sofa, speaker, "
    "stove, suitcase, tablet, telescope, tent, thermometer, toaster, toothbrush, umbrella, vacuum cleaner, watch",
    "a": "app, base, battery, button, cable, case, charger, clip, coating, control panel, cover, design, display, "
    "drawer, filter, finish, frame, grip, handle, hinge, hook, label, latch, lid, lining, lock, manual, menu, motor, "
    "packaging, plug, remote control, screen, sensor, shape, sound, stand, strap, surface, switch, timer, zip",
    "d": "the, this, my",
    "i": "very, really, quite, truly, rather, extremely, particularly, remarkably, fairly, somewhat",
    "t": "this one, this {n}",
    "b": "is, looks, feels, seems",
    "g": "certainly, clearly, definitely, truly",
    "h": "never, hardly, by no means",
    "e": "absolutely, simply, utterly, completely, truly",
    "f": "really, so, truly, very, genuinely",
    "m": "much, slightly, far, a little, even, clearly",
    "number": "two, three, four, five, six, seven, eight, nine, ten, eleven, twelve",
    "month": "January, February, March, April, May, June, July, August, September, October, November, December",
    "day": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
    "colour": "black, blue, brown, green, grey, orange, pink, purple, red, silver, white, yellow",
    "room": "kitchen, garage, office, bedroom, hall, basement, attic, garden",
    "who": "mother, father, sister, brother, neighbour, aunt, uncle, cousin, colleague, grandmother",
    "span": "days, weeks, months, years",
    "when": "every day, at home, on weekends, in the evening, twice a week, in the morning, for work, in winter",
}
OTHERS: dict[str, tuple[str, ...]] = {
    **{kind: tuple(words.split(", ")) for kind, words in _OTHERS.items()},
    "o": _RIVALS,
}
"""Kind -> words without sentiment."""

BEFORE = (
    "I bought {d} {n} in {month}",
    "I ordered a {n} for the {room}",
    "{d} {n} arrived on a {day}",
    "{d} {n} stands in the {room}",
    "I have had {d} {n} for {number} {span}",
    "{d} {n} was meant for my {who}",
    "My {who} chose the {n}",
    "We have a {n} in the {room}",
    "I needed a {n} {when}",
)
"""Sentences without an opinion that bring up the product."""

AFTER = (
    "It came in a {colour} box",
    "I use it {when}",
    "My {who} has one as well",
    "There is also a {colour} one",
    "My {who} uses it {when}",
    "Mine is the {colour} one",
    "It weighs about {number} pounds",
    "My {who} and I share it",
)
"""Sentences without an opinion that follow."""

_OPENERS = ("honestly", "frankly", "to be honest", "I must say", "in my opinion", "truth be told")
_SHORT = (
    ("I am", "I'm"),
    ("it is", "it's"),
    ("cannot", "can't"),
    ("I have", "I've"),
    *((f"{verb} not ", f"{verb}n't ") for verb in ("is", "do", "was", "would", "could")),
)
_LABELS: tuple[str, ...] = ("negative", "positive")
_GROUPS: tuple[str, ...] = ("sentences", "templates", "words")


class Review(NamedTuple):
    """An example and what it is made of."""

    text: str

    label: int
    """0 negative, 1 positive."""

    group: int

    templates: tuple[str, ...]
    """Of its opinions."""


@dataclass
class Reviews:
    """Product reviews with the labels negative and positive, as the module's docstring tells.

    No text stands in two splits or twice in one, and no opinion in two splits. A smaller training split is the
    beginning of a larger one. Labels are balanced to within one example in every split and group.
    """

    examples: int = 12_000
    """Reviews in the training split; 2000 to 100000, so that each template and word is among them."""

    validation: int = 1000
    """Reviews in the validation split, whose opinions are of known templates and words; 100 to 10000."""

    test: int = 1000
    """Reviews in each of the test split's three groups; 100 to 10000."""

    streaming = False
    labels = _LABELS
    multilabel = False
    n_texts = 1
    groups = _GROUPS

    def __post_init__(self) -> None:
        for name, least, most, usual in (
            ("examples", 2000, 100_000, 12_000),
            ("validation", 100, 10_000, 1000),
            ("test", 100, 10_000, 1000),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or not least <= value <= most:
                raise UserError(
                    f"corpus.{name}={value}; expected a whole number from {least} to {most}, such as "
                    f"data.corpus.{name}={usual}."
                )

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits there are."""
        return ("train", "validation", "test")

    def fingerprint(self) -> str:
        """sha256 over the version of the grammar and the sizes, which the reviews are a function of."""
        return hashlib.sha256(json.dumps([_VERSION, self.examples, self.validation, self.test]).encode()).hexdigest()

    def rows(self, split: Split) -> Dataset:
        """A split as `text`, its `label` (an index into `labels`) and its `group` (an index into `groups`)."""
        from datasets import Dataset, Features, Value

        if split not in self.splits:
            raise UserError(f"Reviews has no {split} split; it has {', '.join(self.splits)}.")
        columns = {
            name: [getattr(review, name) for review in self.reviews[split]] for name in ("text", "label", "group")
        }
        features = Features({"text": Value("large_string"), "label": Value("int64"), "group": Value("int64")})
        return Dataset.from_dict(columns, features=features)

    @cached_property
    def reviews(self) -> dict[Split, list[Review]]:
        """split -> its reviews, made at first use."""
        made: dict[Split, list[Review]] = {split: [] for split in self.splits}
        texts: set[str] = set()
        homes: dict[str, Split] = {}  # opinion -> its split
        sizes: list[tuple[Split, int, int]] = [("train", 0, self.examples), ("validation", 0, self.validation)]
        sizes += [("test", group, self.test) for group in range(len(_GROUPS))]
        for seed, (split, group, count) in enumerate(sizes):
            draw = _Draw(seed, group)
            label = 0
            for index in range(count):
                label = 1 - label if index % 2 else int(draw.chance(0.5))  # one of each, in either order
                while True:
                    review, opinions = draw.review(label)
                    if review.text not in texts and all(homes.get(said, split) == split for said in opinions):
                        break
                texts.add(review.text)
                homes.update(dict.fromkeys(opinions, split))
                made[split].append(review)
        return made


class _Draw:
    """Draws one review of a group after the other."""

    def __init__(self, seed: int, group: int) -> None:
        self._random = random.Random(seed).random  # the one method that Python promises to keep for a seed
        self._group = group
        self._words = NEW_WORDS if _GROUPS[group] == "words" else WORDS
        usable = {*self._words, "x", "y"}
        *self._clauses, contrast = (
            [template for template in family if set(re.findall(r"\{(\w)[+-]", template)) <= usable]
            for family in (PLAIN, PLAIN, PLAIN, PLAIN, NEGATION, NEGATION, COMPARISON, COMPARISON, CONTRAST)
        )
        self._asides = [template for template in self._clauses[0] if "{s}" in template]
        known = [*self._clauses, contrast, contrast, contrast, contrast]  # which has many more sentences
        self._opinions = [HELD_OUT] if _GROUPS[group] == "templates" else known
        self._second = 0.0 if _GROUPS[group] == "templates" else 0.2  # a known template would help there

    def review(self, label: int) -> tuple[Review, list[str]]:
        """A review, and its opinions as they are before their wording varies."""
        self._product, self._templates, self._said = self._one(OTHERS["n"]), list[str](), set[str]()
        opinions = [self._opinion(self._one(self._one(self._opinions)), label)]
        if self.chance(self._second):
            opinions.append(self._opinion(self._clause(), label))
        text = " ".join(self._vary(opinion) for opinion in opinions)
        room = 3 - sum(1 + opinion.count(". ") for opinion in opinions)
        if room and self.chance(0.5):
            room -= 1
            text = f"{self._fill(self._one(BEFORE), label)}. {text}"
        if room and self.chance(0.5):
            text = f"{text} {self._fill(self._one(AFTER), label)}."
        text = re.sub(r"\ba(?= [aeiou](?!se))", "an", text)  # an ugly, a useful
        text = re.sub(r"(?:^|[.!] )[a-z]", lambda start: start[0].upper(), text)
        return Review(text, label, self._group, tuple(self._templates)), opinions

    def _opinion(self, template: str, label: int, aside: bool = False) -> str:
        self._templates.append(template)
        return self._fill(template, label, aside)

    def _clause(self) -> str:
        return self._one(self._one(self._clauses))

    def _fill(self, template: str, label: int, aside: bool = False) -> str:
        """The template with words, those of sentiment and the aspects not said before as far as there are others.

        `aside`: it is about an aspect.
        """

        def word(slot: re.Match[str]) -> str:
            kind, sign = slot[1], slot[2]
            polarity = label if sign == "+" else 1 - label
            if kind == "n":
                return self._product
            if kind == "s":
                return "the {a}" if aside or self.chance(0.5) else "{d} {n}"
            if kind == "x":
                return self._opinion(self._one(self._asides), polarity, aside=True)
            if kind == "y":
                return self._opinion(self._clause(), polarity)
            among: Sequence[str] = self._words[kind][polarity] if sign else OTHERS[kind]
            if sign or kind == "a":
                among = [chosen for chosen in among if chosen not in self._said] or among
            chosen = self._one(among)
            self._said.add(chosen)
            return chosen

        for _ in range(2):  # subjects and rivals have slots in turn
            template = re.sub(r"\{(\w+)([+-]?)\}", word, template)
        return template

    def _vary(self, opinion: str) -> str:
        """A sentence of it: contracted, introduced or exclaimed, at times."""
        if self.chance(0.4):
            for long, short in _SHORT:
                opinion = opinion.replace(long, short)
        if self.chance(0.15):
            opinion = f"{self._one(_OPENERS)}, {opinion}"
        return f"{opinion}!" if self.chance(0.1) else f"{opinion}."

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def _one(self, among: Sequence[_T]) -> _T:
        return among[int(self._random() * len(among))]
