"""One small, consistent world: its people, towns and animals, and every fact about them.

The world never changes with a seed: the same people live in the same towns in every file that is ever generated, so
that a model can learn them and a question about them has one right answer. A fact is (subject, relation, value); its
relation holds the wordings: how it is told, asked, answered, and asked with yes or no.

`split_of(key)` is the one rule that keeps exercises apart: the hash of an item's key decides whether it belongs to
train, val or test, whatever the seed and whichever file is written. A fact whose key falls outside train is told (in
the pretraining text, and when somebody says "Tell me about Mia."), but no training record asks for it.
"""

import hashlib
import random
from dataclasses import dataclass

SHARES = {"test": 15, "val": 5}                       # per cent of the keys; the rest is train
SALT = "2771 "                                        # chosen so that small families of exercises get their share too


def split_of(key):
    """'train', 'val' or 'test' for an item's canonical key."""
    bucket = int.from_bytes(hashlib.sha256((SALT + key).encode("utf-8")).digest()[:4], "big") % 100
    if bucket < SHARES["test"]:
        return "test"
    return "val" if bucket < SHARES["test"] + SHARES["val"] else "train"


GIRLS = ("Mia", "Ana", "Zoe", "Lily", "Nora", "Ivy", "Ruby", "Emma", "Rosa", "Clara", "Vera", "June", "Iris", "Kira",
         "Tess")
BOYS = ("Tom", "Ben", "Max", "Sam", "Leo", "Finn", "Jack", "Otto", "Hugo", "Noah", "Oscar", "Felix", "Omar", "Paul",
        "Luke")
PEOPLE = GIRLS + BOYS
TOWNS = ("Mossford", "Elmton", "Brookdale", "Pinehill", "Stonebay", "Windmere", "Goldfield", "Reedport", "Maplewick",
         "Snowpeak")
FOODS = ("apples", "soup", "bread", "honey", "plums", "cheese", "rice", "cake", "nuts", "pears", "eggs", "corn")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "purple")
JOBS = ("baker", "farmer", "teacher", "sailor", "doctor", "painter", "gardener", "singer", "miller", "driver")
PETS = ("cat", "dog", "rabbit", "parrot", "goat", "duck", "pony", "turtle")
THINGS = ("ball", "book", "lamp", "kite", "drum", "boat", "hat", "coat", "cup", "bell", "key", "basket")

# animal: (where it lives, what it eats, its colour)
ANIMALS = {
    "fox": ("forest", "berries", "red"), "owl": ("old tower", "mice", "brown"), "bear": ("cave", "honey", "black"),
    "frog": ("pond", "flies", "green"), "deer": ("forest", "leaves", "brown"), "hen": ("barn", "corn", "white"),
    "horse": ("stable", "hay", "black"), "mouse": ("barn", "cheese", "grey"), "sheep": ("meadow", "grass", "white"),
    "cow": ("meadow", "grass", "brown"), "swan": ("lake", "fish", "white"), "wolf": ("mountains", "meat", "grey"),
}
# town: (what stands there, what it is known for, what it lies by)
TOWN_FACTS = {
    "Mossford": ("mill", "bread", "river"), "Elmton": ("school", "books", "forest"),
    "Brookdale": ("bridge", "fish", "river"), "Pinehill": ("tower", "wood", "forest"),
    "Stonebay": ("lighthouse", "boats", "sea"), "Windmere": ("windmill", "kites", "lake"),
    "Goldfield": ("market", "corn", "meadow"), "Reedport": ("harbour", "ships", "sea"),
    "Maplewick": ("garden", "honey", "lake"), "Snowpeak": ("castle", "ice", "mountains"),
}


@dataclass(frozen=True)
class Relation:
    """The wordings of one kind of fact; {s} is the subject, {v} the value. Every telling ends with the value."""
    name: str
    told: tuple                                       # statements; the first is the usual one, and answers the question
    asked: tuple
    yes_no: str


@dataclass(frozen=True)
class Fact:
    subject: str
    relation: Relation
    value: str

    @property
    def key(self):
        return f"fact:{self.subject}:{self.relation.name}"

    @property
    def statement(self):
        """The plain telling, which is also the answer to a question."""
        return self.told(0)

    def told(self, wording):
        """The fact in the wording of that number, 0 to len(relation.told) - 1."""
        return self.relation.told[wording].format(s=self.subject, v=self.value)


PERSON_RELATIONS = (
    Relation("home", ("{s} lives in {v}.", "The home of {s} is in {v}.", "If you look for {s}, go to {v}."),
             ("Where does {s} live?", "In which town does {s} live?"), "Does {s} live in {v}?"),
    Relation("food", ("{s} likes to eat {v}.", "The favourite food of {s} is {v}.", "Every day {s} eats {v}."),
             ("What does {s} like to eat?", "Which food does {s} like?"), "Does {s} like to eat {v}?"),
    Relation("colour",
             ("{s} likes the colour {v}.", "The favourite colour of {s} is {v}.", "{s} loves all things that are {v}."),
             ("Which colour does {s} like?", "What is the favourite colour of {s}?"), "Does {s} like the colour {v}?"),
    Relation("job", ("{s} works as a {v}.", "The job of {s} is to be a {v}.", "Everyone knows that {s} is a {v}."),
             ("What does {s} work as?", "What is the job of {s}?"), "Does {s} work as a {v}?"),
    Relation("pet", ("{s} has a pet {v}.", "The pet of {s} is a {v}.", "At home {s} keeps a {v}."),
             ("Which pet does {s} have?", "What animal does {s} have?"), "Does {s} have a pet {v}?"),
    Relation("friend",
             ("The best friend of {s} is {v}.", "{s} often plays with {v}.", "{s} is the best friend of {v}."),
             ("Who is the best friend of {s}?", "Who is the friend of {s}?"), "Is the best friend of {s} {v}?"),
)
ANIMAL_RELATIONS = (
    Relation("place", ("The {s} lives in the {v}.", "You can find the {s} in the {v}."),
             ("Where does the {s} live?",), "Does the {s} live in the {v}?"),
    Relation("diet", ("The {s} eats {v}.", "The food of the {s} is {v}."),
             ("What does the {s} eat?",), "Does the {s} eat {v}?"),
    Relation("look", ("The {s} is {v}.", "The colour of the {s} is {v}."),
             ("Which colour is the {s}?",), "Is the {s} {v}?"),
)
TOWN_RELATIONS = (
    Relation("sight", ("In {s} there is a big {v}.", "People come to {s} to see the {v}."),
             ("What can you see in {s}?",), "Is there a big {v} in {s}?"),
    Relation("goods", ("{s} is known for its {v}.", "From {s} comes the best {v}."),
             ("What is {s} known for?",), "Is {s} known for its {v}?"),
    Relation("nature", ("{s} lies by the {v}.", "From {s} you can walk to the {v}."),
             ("What does {s} lie by?",), "Does {s} lie by the {v}?"),
)


def build_facts():
    """Every fact of the world, a list of `Fact`, always the same."""
    rng = random.Random("the world")
    facts = []
    values = {"home": TOWNS, "food": FOODS, "colour": COLOURS, "job": JOBS, "pet": PETS}
    for relation in PERSON_RELATIONS[:-1]:
        dealt = [values[relation.name][i % len(values[relation.name])] for i in range(len(PEOPLE))]
        rng.shuffle(dealt)                            # dealt like cards: every value is used about equally often
        facts += [Fact(person, relation, value) for person, value in zip(PEOPLE, dealt, strict=True)]
    pairs = list(PEOPLE)
    rng.shuffle(pairs)
    for a, b in zip(pairs[::2], pairs[1::2], strict=True):      # friends in pairs: friendship goes both ways
        facts += [Fact(a, PERSON_RELATIONS[-1], b), Fact(b, PERSON_RELATIONS[-1], a)]
    for subjects, relations in ((ANIMALS, ANIMAL_RELATIONS), (TOWN_FACTS, TOWN_RELATIONS)):
        facts += [Fact(subject, relation, value) for subject, row in subjects.items()
                  for relation, value in zip(relations, row, strict=True)]
    return facts


FACTS = build_facts()
FACT_OF = {(fact.subject, fact.relation.name): fact for fact in FACTS}
VALUES = {}                                           # relation name -> its possible values, for wrong suggestions
for _fact in FACTS:
    VALUES.setdefault(_fact.relation.name, []).append(_fact.value)
VALUES = {name: sorted(set(values)) for name, values in VALUES.items()}


def value_of(subject, relation_name):
    """The value of one fact: value_of("Mia", "home") is a town."""
    return FACT_OF[subject, relation_name].value


def pronoun(person):
    return "she" if person in GIRLS else "he"


CATEGORIES = {                                        # for "which one does not belong?"
    "animals": ("fox", "owl", "bear", "frog", "deer", "hen", "horse", "mouse", "sheep", "cow", "swan", "wolf", "dog",
                "cat", "rabbit", "duck"),
    "foods": ("apple", "soup", "bread", "honey", "plum", "cheese", "rice", "cake", "pear", "egg", "corn", "nut"),
    "colours": ("red", "blue", "green", "yellow", "white", "black", "brown", "purple", "grey", "pink"),
    "things": THINGS,
    "jobs": JOBS,
}
WORDS = tuple(sorted({word for words in CATEGORIES.values() for word in words}))    # everyday words for letter games
