"""Sentences for synthetic talkers: seedable, phonetically varied, with a vocabulary held out for
validation and test.

Training sentences use only the words before the held-out lists; validation and test sentences take
every content word from the held-out lists, so that a model is scored on words that it has never
heard.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np

_NOUNS = """apple baby basket bath beach bear bell bird boat book bottle box boy branch bread bridge brother bubble
bus butter cake camel camera candle car carpet castle cat chair cheese child church city cloud coat coffee corner
cousin cow cup curtain dancer daughter doctor dog dollar door dream drum eagle ear egg engine evening farm father
feather field finger fire fish flower fog fox friend frog garden gate ghost girl glass goat goose grandmother grape
guitar hammer hand hat hill honey horse house island jacket jam judge juice king kitchen knife ladder lamb lamp leaf
lemon letter lion lake machine map market meadow melon mirror monkey moon morning mother mountain mouse museum music
needle neighbour nest night ocean office onion orange owl oyster paper park path pea pencil people piano picture
pillow pipe plate pocket poem pony potato prince prize pupil queen question rabbit radio rain ribbon river road
robot roof rope rose sailor salad school sea shadow sheep ship shirt shoe shop shoulder sister snow soap song soup
spider spoon star station stone storm story street sugar summer sun table teacher thing thumb tiger toy train
treasure tree umbrella uncle valley vase village violin visitor voice wagon wall watch water weather wheel whistle
wind window winter wolf woman wood world yard zebra"""
_ADJECTIVES = """amazing angry bad beautiful big black blue bold brave bright broken brown busy calm careful cheap
clean clever cold cool deep dirty dry early easy empty enormous famous fast fine free fresh full funny gentle golden
good great green happy hard heavy high honest hot huge human large lazy left little lonely long loud low lucky mild
modern narrow new nice noisy odd old open pale perfect plain poor pretty proud pure quick quiet rare red rich rough
round sad safe sharp short shy simple sleepy slow small smooth soft sour strange strong sweet tall thick thin tiny
tired true ugly usual warm weak wet white wide wild wise wonderful wrong yellow young"""
_VERBS = """asked baked beat bought broke brought built burned called carried caught changed chose cleaned climbed
closed cooked counted covered cut drew dropped enjoyed fed felt filled finished fixed followed found gave grabbed
heard held helped hid imagined jumped kept kissed knew learned left liked lost loved made measured met missed mixed
moved needed noticed offered opened owned painted paid picked placed planned played praised promised pulled pushed
put reached read remembered saved saw sent served showed sold started stopped studied surprised taught thanked threw
told took touched tried turned used visited waited wanted washed watched wore wrote"""
_ADVERBS = """again always badly bravely calmly carefully early easily finally gently happily hardly loudly maybe
nearly never often only perhaps proudly quickly quietly really sadly slowly sometimes soon suddenly today together
tomorrow usually yesterday"""
_NAMES = """Adam Amy Anna Ben Bob Emma Eve George Hugo Ivy Jack James Jim Joe John Julia Kate Leo Lily Luke Mark
Mary Max Mia Molly Nina Noah Olive Otto Pam Paul Peter Rose Ruby Sam Sarah Sophie Theo Tom Una Victor Walter Will
Yara Zoe"""
_SYLLABLES = """ma ba pa fa va wa la ra da na ka ga sa sha cha ja ya tha mee bee pee fee wee lee dee see shee kee
moo boo poo foo woo loo doo soo shoo koo moe bow po foe woe low doe so show go may bay pay fay way lay day say shay
kay my by pie fie why lie die sigh shy guy map bob pop mom bib mop pub web beam poem palm boom pump mama papa baba
bye-bye"""

_HELD_OUT_NOUNS = """acrobat ambulance balloon banana bakery blanket bicycle camp cathedral chimney chocolate
compass cucumber diamond dolphin elephant envelope factory fountain giraffe harbour helmet hospital kangaroo lantern
library lobster marble medicine mushroom orchestra palace parachute peacock penguin pepper pumpkin puppy pyramid
rainbow sandwich saxophone scissors shepherd squirrel statue strawberry submarine telescope theatre tomato tortoise
trumpet tunnel turtle volcano waterfall whale wizard workshop"""
_HELD_OUT_ADJECTIVES = """ancient awful bitter bumpy charming crimson curious dusty faithful fragile frozen gloomy
humble jolly massive muddy peculiar playful purple rapid shiny silver spotless stubborn violet wooden"""
_HELD_OUT_VERBS = """admired balanced borrowed chased collected decorated delivered discovered described examined
gathered ignored invented mentioned observed polished preferred protected removed repaired swallowed welcomed
whispered wrapped"""
_HELD_OUT_ADVERBS = """abruptly boldly cheerfully eagerly frequently immediately meanwhile patiently politely
smoothly steadily"""
_HELD_OUT_NAMES = """Abigail Benjamin Beatrice Clara Dominic Fiona Gabriel Hannah Oliver Penelope Rebecca Simon
Vanessa William"""

_TEMPLATES = (
    "The {a} {n} {v} the {n} {d}.",
    "{p} {v} {a} {n}s and a {a} {n}.",
    "{p} and {p} {v} my {n}, and the {n} was {a}.",
    "Where is the {a} {n} that {p} {v}?",
    "I {v} a {n}, but you {v} the {a} {n}.",
    "We have a {a} {n} for {p}.",
    "Oh, what a {a} {n}!",
    "{d}, {p} {v} our {n} by the {n}.",
    "Is your {n} more {a} than mine?",
    "Who {v} the {n}, {p} or {p}?",
    "{p}, please give me the {n} and the {a} {n}.",
    "This {n} is {a}, and that {n} is {a} too.",
    "It was a {a} {n}, so I {v} it {d}.",
    "Why would a {n} be so {a}?",
    "My {n} and your {n} are both {a}.",
    "There were {k} {n}s, {k} {n}s, and {k} {a} {n}s.",
    "You and I {v} it {d}, with a {a} {n}.",
    "How many {n}s do you see?",
    "Yes, {p} {v} it. No, the {n} is not {a}.",
    "If the {n} is {a}, I will go with {p}.",
    "{n}, {n}, {n}, {n}, and {n}.",
    "{a}, {a}, {a}, and {a}.",
)
_NUMBERS = (
    """two three four five six seven eight nine ten eleven twelve twenty forty fifty hundred"""
)

_FOREIGN = {
    "de": """Abend alle Apfel arbeiten Baum beide Bild Blume bleiben Brot Buch Bruder dunkel Eimer Fenster Feuer
        fahren Freund Garten geben gehen gut Haus heute Himmel hoffen immer Jahr kaufen Kind klein kommen lange
        leben Licht lieben machen Mann Morgen Mond Mutter neu oben Papier Platz rufen sagen Schiff schön sehen
        Sommer Sonne Stuhl suchen Tisch Vater viel Vogel warm Wasser Weg weiß wollen Wort Zeit über ohne und aber""",
    "es": """abuelo agua amigo amor barco beber blanco bonito bosque brazo bueno cabeza calle cama camino campo
        cantar casa ciudad comer corazón dormir escuela feliz flor fuego fuerte gato grande hablar hermano hijo
        hombre jugar lago leche libro limpio luna luz madre mañana mar mesa mujer mundo música niño noche nube nuevo
        padre pan papel perro piedra playa pueblo puerta rojo silla sol sombra tiempo tierra vaca ventana verde vida
        viento pero muy""",
    "fr": """aimer ami arbre beau blanc boire bois bon bouche bras bruit café chaise chambre chanter chat chemin
        cheval ciel cœur deux eau école enfant été fenêtre fête feu fille fleur frère froid fromage garçon grand
        heure homme hiver jardin jour lait livre lumière lune main maison manger matin mère monde musique neige neuf
        nuit oiseau pain papier père petit pluie pomme pont porte poule rouge rue soleil table temps terre vélo vent
        vert ville mais avec""",
    "it": """acqua albero amico amore anno aprire bambino bello bene bianco bosco braccio buono caffè campo cane
        cantare casa cavallo cielo città cuore dire donna dormire estate famiglia fare festa fiore fiume forte
        fratello freddo fuoco gatto giardino giorno grande isola lago latte libro luce luna madre mano mare mattina
        mela mondo musica neve notte nuovo occhio padre pane parola piccolo pioggia ponte porta rosso sera sole
        strada tavolo tempo terra uomo uovo ma""",
    "pt-br": """abrir água amigo amor ano azul bairro banco barco beber bola bom bonito braço branco cabeça café
        cama caminho campo casa céu chuva cidade coração dançar dormir escola feliz festa filho flor fogo forte frio
        gato grande homem hoje irmão jogar lago leite livro lua luz mãe manhã mar mesa menino muito mulher mundo
        música noite novo nuvem olho pai palavra pão papel pedra peixe porta praia rio rua sol tarde tempo terra
        vento verde vida mas sobre""",
    "nl": """avond appel bloem boek boom boot brood broer buiten deur donker drie eten fiets geven goed groot hand
        huis jaar kaas kamer kind klein komen kopen lamp lang leven licht lopen maan maken man melk mooi moeder muur
        nacht nieuw oog open papier paard plaats raam regen schip school slapen spelen stad steen stoel straat tafel
        tuin vader veel vier vis vogel vrouw vuur warm water weg werk wind zee zien zomer zon maar""",
}
_HELD_OUT_FOREIGN = {
    "de": (
        "Bahnhof Berg Brief Butter Frühling Gabel Hammer Insel Kuchen Löffel Pferd Regen Schule "
        "Straße Wolke Zimmer"
    ),
    "es": (
        "bicicleta cuchara espejo guitarra invierno manzana mariposa naranja paloma primavera "
        "pájaro reloj zapato"
    ),
    "fr": (
        "abeille bateau bougie chapeau couteau forêt lapin montagne mouton nuage orange "
        "papillon "
        "printemps voiture"
    ),
    "it": (
        "bicicletta bottiglia chitarra farfalla formaggio inverno montagna nuvola orologio "
        "primavera scuola specchio"
    ),
    "pt-br": (
        "abelha bicicleta borboleta chapéu colher espelho floresta inverno janela laranja "
        "montanha sapato"
    ),
    "nl": (
        "aardappel bakker bruiloft eekhoorn herfst konijn lepel muziek olifant paraplu spiegel "
        "vlinder winkel wolk"
    ),
}


@dataclass(frozen=True)
class Vocabulary:
    """The content words of one side of the split.

    Attributes:
        words: English word lists by template slot: n(oun), a(djective), v(erb), d (adverb),
            p(erson).
        foreign: words of other languages by espeak language code.
        syllables: lip drills ("ma ba pa"), training only.
    """

    words: dict[str, tuple[str, ...]]
    foreign: dict[str, tuple[str, ...]]
    syllables: tuple[str, ...]


def _split(*texts: str) -> list[tuple[str, ...]]:
    return [tuple(dict.fromkeys(text.split())) for text in texts]


@cache
def vocabulary(held_out: bool = False) -> Vocabulary:
    """Word lists of the training split, or of the validation and test splits (``held_out``)."""
    if held_out:
        lists = _split(
            _HELD_OUT_NOUNS,
            _HELD_OUT_ADJECTIVES,
            _HELD_OUT_VERBS,
            _HELD_OUT_ADVERBS,
            _HELD_OUT_NAMES,
        )
        foreign, syllables = _HELD_OUT_FOREIGN, ""
    else:
        lists = _split(_NOUNS, _ADJECTIVES, _VERBS, _ADVERBS, _NAMES)
        foreign, syllables = _FOREIGN, _SYLLABLES
    return Vocabulary(
        words=dict(zip("navdp", lists, strict=True)),
        foreign={language: tuple(words.split()) for language, words in foreign.items()},
        syllables=tuple(syllables.split()),
    )


@dataclass(frozen=True)
class Sentence:
    """A text in one language (espeak language code)."""

    text: str
    language: str


def sample_language(rng: np.random.Generator) -> str:
    """Draw the language of a clip: American or British English 86 %, other languages 14 %."""
    if rng.random() < 0.14:
        return str(rng.choice(sorted(_FOREIGN)))
    return str(rng.choice(["en-us", "en-us", "en"]))


def sample_sentence(rng: np.random.Generator, language: str, held_out: bool = False) -> Sentence:
    """Draw one sentence: a filled template, a row of words, or (training, English) a lip drill.

    Raises:
        KeyError: the language has no word list.
    """
    vocab = vocabulary(held_out)
    if not language.startswith("en"):
        return Sentence(_row(rng, vocab.foreign[language], int(rng.integers(4, 9))), language)
    if vocab.syllables and rng.random() < 0.12:
        return Sentence(_row(rng, vocab.syllables, int(rng.integers(5, 10))), language)
    template = str(rng.choice(_TEMPLATES))
    lists = {**vocab.words, "k": tuple(_NUMBERS.split())}
    text = re.sub(r"\{(\w)\}", lambda slot: str(rng.choice(lists[slot[1]])), template)
    # A plural "s" glued to a word ending in a hiss needs its vowel, as in "fishes".
    text = re.sub(r"(\w+(?:s|sh|ch|x))s\b", _plural, text)
    return Sentence(text[0].upper() + text[1:], language)


def _plural(match: re.Match[str]) -> str:
    return match[0] if match[1] not in _nouns() else match[1] + "es"


@cache
def _nouns() -> frozenset[str]:
    return frozenset(vocabulary(False).words["n"] + vocabulary(True).words["n"])


def _row(rng: np.random.Generator, words: tuple[str, ...], count: int) -> str:
    """A row of words with commas now and then, so that the pitch and the pauses vary."""
    chosen = [str(word) for word in rng.choice(words, size=count)]
    commas = rng.random(count - 1) < 0.25
    joined = "".join(
        word + (", " if comma else " ")
        for word, comma in zip(chosen, [*commas, False], strict=True)
    )
    return joined.strip().capitalize() + "."
