"""Words and values, and the line between what training may see and what is kept for evaluation."""

from __future__ import annotations

import random
import string
import zlib
from collections.abc import Sequence
from typing import Final

WORDS: Final[dict[str, list[str]]] = {
    "name": (
        "Ada Alice Bob Carol Dave Erin Frank Grace Heidi Ivan Judy Karl Laura Mallory Nina Oscar Peggy Quentin Rupert Sybil "
        "Trent Ursula Victor Wendy Xavier Yvonne Zoe Liam Noah Emma Olivia Mia Lucas Mateo Sofia Chen Wei Priya Ravi Anika Kofi "
        "Amara Yuki Hana Kenji Lars Ingrid Bjorn Freya Pierre Amelie Giulia Marco Elena Dmitri Olga Fatima Omar Layla Yusuf "
        "Tariq Sven Astrid Hugo Chloe Felix Clara Jonas Marta Pablo Lucia Diego Carmen Rosa Ines Tom Sam Max Leo Ben Kate Anna "
        "Lena Paul Peter Mary John James Sarah David Linda Susan Robert Maria Nancy Betty Helen Sandra Donna Carl Roger Keith "
        "Terry Sean Gloria Teresa Rose Janet Marie Diane Julie Joyce Alan Niels Marek Zofia Tomas Petra Milan Katya Boris Nadia "
        "Ahmed Aisha Malik Zara Ryo Mei Jun Akira Sakura Isaac Farouk Jacob Kwame Ludwig Gustav Tadeusz Asif Mustafa Raj Beth "
        "Ruth Hedwig Kazimierz Siddharth Joaquim Luiz Nasreen Qadir Vikram Zeynep Eoghan Siobhan Tadhg Caoimhe Ulf Rolf Zeb"
    ).split(),
    "colour": (
        "teal red blue green yellow orange purple pink brown black white grey cyan magenta crimson scarlet amber indigo violet "
        "maroon navy olive lime turquoise beige ivory gold silver bronze coral salmon lavender mauve peach plum ruby emerald "
        "sapphire ochre khaki charcoal mint mustard lilac fuchsia"
    ).split(),
    "city": (
        "Paris London Berlin Madrid Rome Oslo Vienna Prague Dublin Lisbon Athens Warsaw Budapest Helsinki Stockholm Copenhagen "
        "Brussels Zurich Geneva Milan Naples Turin Porto Seville Valencia Lyon Nice Hamburg Munich Cologne Tokyo Osaka Kyoto "
        "Seoul Beijing Shanghai Delhi Mumbai Cairo Lagos Nairobi Accra Tunis Boston Chicago Denver Seattle Austin Miami Toronto "
        "Montreal Vancouver Lima Quito Bogota Santiago Sydney Melbourne Perth Auckland Reykjavik Tallinn Riga Vilnius Bucharest "
        "Belgrade Zagreb Ankara Tehran Baghdad Karachi Dhaka Bangkok Hanoi Manila Jakarta"
    ).split(),
    "food": (
        "pizza sushi pasta curry tacos ramen soup salad bread cheese apples mangoes noodles dumplings pancakes waffles lasagne "
        "paella risotto falafel hummus kebab burritos chocolate oysters lobster tofu kimchi porridge omelette goulash ravioli "
        "gnocchi couscous olives walnuts almonds pears plums figs dates cherries carrots onions leeks peas beans lentils rice oats honey toast jam yoghurt trout"
    ).split(),
    "animal": (
        "cat dog horse owl fox wolf bear otter tiger lion eagle rabbit turtle dolphin whale penguin koala panda lizard falcon "
        "badger beaver camel crow deer duck elephant ferret frog giraffe goat goose hamster hedgehog heron lemur llama lynx mole "
        "moose mouse newt octopus parrot pigeon raven seal shark sheep snail spider squid swan toad walrus weasel zebra"
    ).split(),
    "thing": (
        "anchor basket candle drum engine feather garden hammer island jacket kettle ladder mirror needle oven pencil quilt "
        "ribbon saddle table umbrella violin window yarn zipper bottle camera desk easel fiddle guitar harp jar kite lamp map "
        "notebook orchid piano rope sail tent urn vase wheel atlas beacon cannon dagger ember flute goblet helmet lantern marble "
        "nutmeg opal pebble quarry rudder sextant thimble valley willow"
    ).split(),
    "subject": (
        "chemistry physics history geography music biology algebra geometry poetry painting astronomy botany cooking tennis "
        "chess hockey football rowing sailing skiing climbing dancing knitting pottery fishing hiking cycling running swimming "
        "gardening baking reading photography carpentry archery fencing karate yoga juggling"
    ).split(),
    "country": (
        "France Spain Norway Japan Kenya Peru Chile Canada Italy Greece Poland Austria Belgium Ireland Portugal Sweden Finland "
        "Turkey Egypt Ghana India China Korea Vietnam Brazil Mexico Cuba Iceland Latvia Estonia Croatia Hungary"
    ).split(),
    "job": (
        "baker nurse pilot plumber lawyer painter farmer sailor tailor chemist surgeon dentist builder singer writer editor "
        "barber gardener miner judge clerk cook driver waiter actor dancer florist jeweller carpenter librarian"
    ).split(),
    "verb": (
        "get find search fetch check convert count send create list read open calculate show update measure book order delete "
        "add start stop translate compare track schedule cancel save load play print sort rank estimate describe lookup inspect query resolve"
    ).split(),
    "noun": (
        "weather price distance sum product temperature time user file note order stock population news score route balance "
        "status length area speed event message recipe word page record magic invoice altitude parcel tide customer account "
        "ticket booking payment device sensor report project task meeting article song movie flight hotel train branch "
        "commit server volume budget ranking forecast horoscope exchange dictionary calendar reminder shipment inventory"
    ).split(),
    "parameter": (
        "city name x y a b value id query text date amount user number key place title word unit path topic item email count "
        "code currency input target depth location limit start end size language format color style month year day "
        "first second source label speed width height customer_name order_id start_date file_path max_results zip_code"
    ).split(),
    "attribute": (
        "colour color food dish animal city sport hobby subject number drink book song film game flower season fruit language "
        "band country author tool place planet instrument movie bird snack town toy pastime tree poem"
    ).split(),
    "relative": (
        "dog cat horse sister brother mother father friend boss teacher neighbour daughter son wife husband partner cousin aunt "
        "uncle doctor parrot colleague grandmother coach"
    ).split(),
    "object": (
        "garage safe door locker server printer project ticket office gate laptop phone bank vault alarm order flight train shed "
        "router parcel studio meeting car hotel room team"
    ).split(),
    "property": (
        "code password key number name address model serial label colour owner price size badge nickname city day leader".split()
    ),
    "region": "CA NY TX WA OR UK IL MA FL NV ON BC QC DE AZ CO".split(),
    "month": "January February March April May June July August September October November December".split(),
}

# Kept out of training whatever their checksum says: tests and demonstrations ask for these, or they
# belong to a kind whose commonest words ("get", "id") training needs.
RESERVED: Final = frozenset(
    (
        "ada teal paris magic customer customer_name adder unicode location input tariq zurich joke setup punchline "
        "lookup inspect query resolve invoice altitude parcel tide forecast target depth zip_code "
        "movie bird snack town toy pastime colleague grandmother coach shed router studio badge nickname"
    ).split()
)
_VALUE_KINDS: Final = "name colour city food animal thing subject country job".split()

# Words of schemas are invented more often in training than in evaluation: what cannot be known must be copied.
_INVENTED_IN_TRAINING: Final = {"noun": 0.5, "parameter": 0.45, "verb": 0.25}

_SCHEMA_WORDS: Final = frozenset(
    word for kind, words in WORDS.items() if kind not in _VALUE_KINDS for word in words
)

_HAN: Final = "你好啊集团公司北京上海天地人山水火木金土日月星河大小中国东西南北春夏秋冬花草风雨云雪书画茶米鱼马牛羊龙凤红黄蓝白黑高长新老明光电车船飞学生医家城门路石林海江湖"
_KANA: Final = "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわをんアイウエオカキクケコサシスセソタチツテトナニヌネノ株式会社東京"
_HANGUL: Final = "가나다라마바사아자차카타파하서울부산한국김이박최정강조윤장임"
_CYRILLIC: Final = "абвгдежзийклмнопрстуфхцчшщыэюя"
_GREEK: Final = "αβγδεζηθικλμνξοπρστυφχψω"
_ACCENTS: Final = {
    "a": "áàâäãåā", "e": "éèêëēę", "i": "íìîïī", "o": "óòôöõøō", "u": "úùûüū", "c": "çčć", "n": "ñń", "s": "šśş", "z": "žźż",
    "l": "ł", "y": "ýÿ",
}  # fmt: skip
_ONSETS: Final = "b br c ch d dr f fl g gr h j k kl l m n p pr qu r s sh sk sp st t th tr v w x y z".split()
_VOWELS: Final = "a e i o u a e i o u ai ea oo ee ou y ie ua".split()
_CODAS: Final = [
    "",
    "",
    *"n r l s m t k nd x rt p b d q j v w h y z c f g ck sh th ng ff ll ss tz rk lm ph".split(),
]


def is_held_out(text: str) -> bool:
    """Whether a word belongs to evaluation: one in eight does, by checksum."""
    folded = text.lower()
    return folded in RESERVED or zlib.crc32(folded.encode()) % 8 == 0


def split_wordings(wordings: Sequence[str]) -> tuple[list[str], list[str]]:
    """The wordings for training and those for evaluation, about one in eight and at least one."""
    ordered = sorted(wordings, key=lambda wording: zlib.crc32(wording.encode()))
    held = max(1, len(ordered) // 8) if len(ordered) > 2 else 0
    return [w for w in wordings if w not in ordered[:held]], ordered[:held] or list(wordings)


class Source:
    """A seeded source of values and wordings.

    With ``held_values`` every word and invented name is one that training never sees, with
    ``held_wordings`` every sentence form is.
    """

    def __init__(self, seed: int, *, held_values: bool = False, held_wordings: bool = False) -> None:
        self.rng = random.Random(seed)
        self.held_values = held_values
        self.held_wordings = held_wordings

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.rng.random() < probability

    def pick(self, *options: str) -> str:
        """One of the options, which are the same in training and evaluation."""
        return self.rng.choice(options)

    @property
    def trains(self) -> bool:
        """Whether this is for training. What only training does must not change what evaluation draws."""
        return not self.held_values

    def phrase(
        self,
        wordings: Sequence[str],
        *,
        more: tuple[str, ...] = (),
        leads: tuple[str, ...] = (),
        **slots: object,
    ) -> str:
        """One of the allowed wordings with its slots filled; training has ``more`` of them, and varies them.

        ``leads`` are what a wording may begin with in training.
        """
        trained, held = split_wordings_cached(tuple(wordings))
        if not self.trains:
            return self.rng.choice(held if self.held_wordings else trained).format(**slots)
        wording = self.rng.choice([*trained, *more])
        if leads and self.chance(0.12):
            led = self.rng.choice(leads) + _inside(wording)
            wording = wording if plain(led) in map(plain, held) else led
        varied = self._varied(wording)
        return (wording if varied in held else varied).format(**slots)

    def _varied(self, wording: str) -> str:
        """Sometimes without the capital letter or the mark at its end, as people write."""
        if wording[:1].isalpha() and not wording.startswith("I") and self.chance(0.12):
            wording = wording[0].lower() + wording[1:]
        return wording[:-1] if wording.endswith((".", "?")) and self.chance(0.12) else wording

    def word(self, kind: str, invented: float = 0.4) -> str:
        """A word of a kind, or an invented one."""
        if self.trains:
            invented = max(invented, _INVENTED_IN_TRAINING.get(kind, 0.0))
        if self.chance(invented):
            return self.invented(capital=kind in {"name", "city", "country"})
        return self.rng.choice(_pools()[kind, self.held_values])

    def invented(self, *, capital: bool = False) -> str:
        """A word that means nothing; every letter may end it and any two letters may meet in it."""
        while True:
            word = self._letters() if self.chance(0.15) else self._syllables()
            if is_held_out(word) == self.held_values:
                return word.capitalize() if capital else word

    def _syllables(self) -> str:
        count = self.rng.choice((1, 2, 2, 2, 3))
        return "".join(self.pick(*_ONSETS) + self.pick(*_VOWELS) + self.pick(*_CODAS) for _ in range(count))

    def _letters(self) -> str:
        return "".join(self.rng.choices(string.ascii_lowercase, k=self.rng.randint(3, 7)))

    def topic(self) -> str:
        """Something one can talk about."""
        return self.word(self.pick("colour", "food", "animal", "animal", "thing", "thing", "subject"))

    def number(self, most: int = 5) -> str:
        """A whole number of one to ``most`` digits."""
        digits = self.rng.choice((1, 1, 2, 2, 3, 4, most))
        return str(self.rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1))

    def decimal(self) -> str:
        """A number with a point."""
        return f"{self.rng.randint(0, 999) if self.chance(0.3) else self.rng.randint(0, 40)}.{self.rng.randint(1, 9)}"

    def code(self) -> str:
        """A number, a serial such as ``KX-482``, or invented words joined."""
        form = self.rng.random()
        if form < 0.4:
            return self.number()
        if form < 0.65:
            letters = "".join(self.rng.choices(string.ascii_uppercase, k=self.rng.randint(1, 3)))
            return f"{letters}{self.pick('-', '-', '')}{self.number(4)}"
        if form < 0.85:
            return self.invented() + self.number(3)
        return f"{self.invented()}-{self.invented()}"

    def date(self) -> str:
        """A date in digits, or a day and month."""
        day, month = self.rng.randint(1, 28), self.rng.randint(1, 12)
        if self.chance(0.6):
            return f"{self.rng.randint(1990, 2039)}-{month:02d}-{day:02d}"
        return f"{WORDS['month'][month - 1]} {day}"

    def unicode(self) -> str:
        """A value that plain letters cannot write."""
        while True:
            value = self._foreign() if self.chance(0.6) else self._accented()
            if is_held_out(value) == self.held_values:
                return value

    def _foreign(self) -> str:
        script = self.rng.choice((_HAN, _HAN, _KANA, _KANA, _HANGUL, _CYRILLIC, _GREEK))
        word = "".join(self.rng.choices(script, k=self.rng.randint(2, 6)))
        return word.capitalize()

    def _accented(self) -> str:
        base = self.word("name") if self.chance(0.5) else self.invented(capital=True)
        changed = "".join(
            self.rng.choice(_ACCENTS[c]) if c in _ACCENTS and self.chance(0.5) else c for c in base
        )
        return changed if changed != base else base + "é"


_split_cache: dict[tuple[str, ...], tuple[list[str], list[str]]] = {}
_pool_cache: dict[tuple[str, bool], list[str]] = {}


def plain(wording: str) -> str:
    """A wording without what people leave out: two of them that are plainly the same are the same."""
    return wording.lower().rstrip(".?")


def _inside(wording: str) -> str:
    """A wording as it stands after the beginning of a sentence."""
    return wording if wording.startswith(("I ", "I'm", "{")) else wording[0].lower() + wording[1:]


def split_wordings_cached(wordings: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """``split_wordings``, done once for each set."""
    if wordings not in _split_cache:
        _split_cache[wordings] = split_wordings(wordings)
    return _split_cache[wordings]


def _pools() -> dict[tuple[str, bool], list[str]]:
    if not _pool_cache:
        for kind, words in WORDS.items():
            held = [
                w
                for w in words
                if w.lower() in RESERVED
                or (kind in _VALUE_KINDS and is_held_out(w) and w not in _SCHEMA_WORDS)
            ]
            _pool_cache[kind, False] = [word for word in words if word not in held]
            _pool_cache[kind, True] = held or words
    return _pool_cache
