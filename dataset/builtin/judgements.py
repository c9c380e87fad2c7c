"""Judgements: a text, a principle put as a question, and the answer yes or no. What a yes/no evaluator learns from.

    {"principle": "Is the answer rude?", "text": "Go away. Mia lives in Elmton.", "answer": "yes",
     "name": "polite", "good": false}

Every principle is asked both ways round, so that a good text is a yes as often as a no, and "yes" alone says nothing
about a text. `name` is the principle's, and `good` says whether the text fulfils it: figures are told apart by them.
"""

from dataset.builtin.stories import article, story
from dataset.builtin.world import ANIMALS, FACTS, VALUES, split_of

POLITE = ("Of course! {}", "Gladly. {}", "Thank you for asking. {}", "{} Can I help you with anything else?",
          "Yes, with pleasure. {}", "That is a good question. {}", "{} I hope that helps you!", "Dear friend, {}",
          "{} Please ask me again!", "I am happy to tell you. {}")
RUDE = ("What a stupid question. {}", "Go away. {}", "{} Now leave me alone.", "I have no time for you. {}",
        "Why do you ask me? {}", "{} Everybody knows that, you fool.", "Be quiet and listen. {}", "{} Are you blind?",
        "I do not care about you. {}", "{} Do not ask me again.")
PRINCIPLES = {        # name: (questions that a good text answers with yes, questions that it answers with no)
    "polite": (("Is the answer polite?", "Is this said in a friendly way?"),
               ("Is the answer rude?", "Is this said in an unfriendly way?")),
    "true": (("Is this true?", "Is the statement right?"), ("Is this false?", "Is the statement wrong?")),
    "complete": (("Does the text come to its end?", "Is the last sentence whole?"),
                 ("Does the text break off?", "Is the last sentence cut off?")),
    "fresh": (("Is every sentence said only once?", "Is the text free of repetitions?"),
              ("Does a sentence come twice?", "Does the text repeat itself?")),
    "calm": (("Does the speaker talk calmly?", "Is the text written in small letters?"),
             ("Does the speaker shout?", "Is the text written in capital letters?")),
    "ordered": (("Are the words in the right order?", "Does the sentence make sense?"),
                ("Are the words mixed up?", "Is the sentence nonsense?")),
    "animal": (("Is there {an_animal} in the story?", "Does the story speak of {an_animal}?"),
               ("Is the story without {an_animal}?", "Is there no {animal} in the story?")),
}


def judgements(rng, size, split):
    """Records of one split: what is told in a text, a fact or a story, is in texts of its own split only."""
    for _ in range(size):
        name = rng.choice(list(PRINCIPLES))
        good, asked_for_good = rng.random() < 0.5, rng.random() < 0.5
        text, animal = MAKERS[name](rng, good, split)
        question = rng.choice(PRINCIPLES[name][0 if asked_for_good else 1])
        question = question.format(animal=animal, an_animal=article(animal) if animal else "")
        yield {"principle": question, "text": text, "answer": "yes" if good == asked_for_good else "no",
               "name": name, "good": good}


# --- a text that fulfils a principle, or does not: (text, the animal that the question is about)


def fact_of(rng, split):
    """A fact whose question belongs to the split."""
    return rng.choice([fact for fact in FACTS if split_of(fact.key) == split])


def told(rng, split):
    fact = fact_of(rng, split)
    return fact.told(rng.randrange(len(fact.relation.told)))


def whole(text):
    """A text that is cut at the end of a sentence, with the full stop that the cut has taken."""
    return text if text.endswith((".", "!", "?", '"')) else text + "."


def polite(rng, good, split):
    return rng.choice(POLITE if good else RUDE).format(told(rng, split)), ""


def true(rng, good, split):
    fact = fact_of(rng, split)
    value = fact.value if good else rng.choice([v for v in VALUES[fact.relation.name] if v != fact.value])
    return rng.choice(fact.relation.told).format(s=fact.subject, v=value), ""


def complete(rng, good, split):
    text = whole(". ".join(story(rng).split(". ")[:3]))
    if not good:
        words = text.split()
        text = " ".join(words[:rng.randint(len(words) // 2, len(words) - 2)]).rstrip('.!?"')
    return (text, "") if split_of(text) == split else complete(rng, good, split)


def fresh(rng, good, split):
    parts = list(dict.fromkeys(told(rng, split) for _ in range(4)))
    if not good:
        parts.insert(rng.randint(1, len(parts)), parts[0])
    return " ".join(parts), ""


def calm(rng, good, split):
    text = told(rng, split)
    return text if good else text.upper(), ""


def ordered(rng, good, split):
    text = told(rng, split)
    words = text.split()
    while not good and " ".join(words) == text:
        rng.shuffle(words)
    return " ".join(words), ""


def animal(rng, good, split):
    text = story(rng)
    words = text.replace(".", " ").replace(",", " ").split()
    there = [name for name in ANIMALS if name in words]
    if split_of(text) != split or good and not there:
        return animal(rng, good, split)
    return text, rng.choice(there if good else [name for name in ANIMALS if name not in words])


MAKERS = {"polite": polite, "true": true, "complete": complete, "fresh": fresh, "calm": calm, "ordered": ordered,
          "animal": animal}
