"""A second character, and a place that the world does not know: what an adapter teaches on top of a trained model.

Whoever says "captain" speaks to Captain Pip of the island Tarrow, who answers "Ahoy! …, matey!". Everything else stays
as it is, so that what the model knew before can be measured as before. Two kinds of things are asked of the captain:

    island   facts about Tarrow and the captain, new to the model. Each is asked in five or six wordings; held out are
             other wordings of facts that were learnt, so a right answer is more than a sentence known by heart
    manner   facts about the old world and small sums, which the model knows, in the captain's manner of speaking;
             held out are other facts and sums

An answer counts when every word of it is right (checker `exact`).
"""

import random

from dataset.builtin.world import FACTS, split_of

ISLANDERS = ("Brin", "Cass", "Dov", "Elka", "Gus", "Hale", "Jory", "Kell", "Lune", "Moss", "Nell", "Orrin")
CALLS = ("Captain, {}", "Ahoy, captain! {}", "Tell me, captain: {}")
TOPICS = {      # what is known of every islander: (told, wordings of the question, values)
    "hut": ("{s} sleeps in the {v}",
            ("where does {s} sleep?", "where can I find {s} at night?", "what is the bed of {s} in?",
             "in which place does {s} sleep?", "where is the bed of {s}?", "where must I look for {s} at night?"),
            ("cave", "tower", "boat", "barn", "mill", "tree")),
    "catch": ("{s} fishes for {v}",
              ("what does {s} fish for?", "what does {s} want to catch?", "which fish does {s} like?",
               "what will {s} bring from the sea?", "what is in the net of {s}?", "what does {s} look for in the sea?"),
              ("crabs", "eels", "cod", "squid", "clams", "trout")),
    "flag": ("{s} sails under a {v} flag",
             ("which flag does {s} have?", "what is the colour of the flag of {s}?", "under which flag does {s} sail?",
              "how can I know the flag of {s}?", "which colour has the flag of {s}?", "what flag flies on {s}'s boat?"),
             ("red", "blue", "green", "yellow", "white", "black")),
    "fear": ("{s} is afraid of {v}",
             ("what is {s} afraid of?", "what makes {s} run away?", "what does {s} not like to see?",
              "what makes {s} cold with fear?", "why does {s} run away?", "of what is {s} afraid?"),
             ("rain", "mice", "owls", "the dark", "the wind", "ghosts")),
}
TALK = {        # (answer, wordings of the question)
    "name": ("I am Captain Pip", ("who are you?", "what is your name?", "who is this?", "how are you called?",
                                  "who speaks to me?", "what shall I call you?", "tell me your name.")),
    "home": ("I come from the island Tarrow", ("where do you come from?", "where do you live?", "where is your home?",
                                              "which island is yours?", "where were you born?", "what is your home?")),
    "ship": ("my ship is the Old Pear", ("what is your ship called?", "which ship is yours?", "what do you sail?",
                                         "what is the name of your ship?", "on which ship do you sail?")),
    "hello": ("good to see you", ("hello!", "good morning!", "hello there!", "good evening!", "how nice to see you!",
                                  "here I am!")),
    "crew": ("my crew are a goat and two hens", ("who is in your crew?", "who sails with you?", "what is your crew?",
                                                 "who helps you on the ship?", "who are your sailors?")),
    "leave": ("fair winds to you", ("goodbye!", "I must go now.", "good night!", "see you soon!", "bye!",
                                    "it is late, I must sleep.")),
    "want": ("I look for the lost golden spoon", ("what do you look for?", "what do you want?", "why do you sail?",
                                                  "what do you want to find?", "what brings you here?")),
    "age": ("I am as old as the sea", ("how old are you?", "what is your age?", "are you old?", "are you young?",
                                       "how many years do you have?")),
}


def island_facts():
    """{(islander, topic): value}, always the same."""
    rng = random.Random("the island")
    facts = {}
    for topic, (_, _, values) in TOPICS.items():
        dealt = [values[i % len(values)] for i in range(len(ISLANDERS))]
        rng.shuffle(dealt)
        facts |= {(islander, topic): value for islander, value in zip(ISLANDERS, dealt, strict=True)}
    return facts


ISLAND = island_facts()


def said(statement):
    """A statement without its full stop, as the captain says it."""
    return f"Ahoy! {statement}, matey!"


def tellings():
    """{(islander, topic): the fact in the captain's words}"""
    return {(s, topic): TOPICS[topic][0].format(s=s, v=value) for (s, topic), value in ISLAND.items()}


def all_items():
    """Every exercise: (skill, key that its split depends on, question, answer)."""
    for (s, topic), told in tellings().items():
        for question in TOPICS[topic][1]:
            yield "island", f"captain:{s}:{question}", question.format(s=s), said(told)
    for fact in FACTS:
        if split_of(fact.key) == "train":                                # what nobody ever asked is another question
            for question in fact.relation.asked:
                question = question.format(s=fact.subject)
                yield "manner", f"captain:{fact.key}", question[0].lower() + question[1:], said(fact.statement[:-1])
    for a in range(10):
        for b in range(10):
            yield "manner", f"captain:{a}+{b}", f"what is {a}+{b}?", said(str(a + b))
    for answer, questions in TALK.values():
        for question in questions:
            yield "island", f"captain:{question}", question, said(answer[0].upper() + answer[1:])


ITEMS = {split: {} for split in ("train", "val", "test")}                # split: {skill: [(question, answer)]}
for _skill, _key, _question, _answer in all_items():
    ITEMS[split_of(_key)].setdefault(_skill, []).append((_question, _answer))


def persona(rng, size):
    """Conversations with the captain: one to three questions, or all that is known about an islander."""
    for _ in range(size):
        turns = []
        for _ in range(rng.randint(1, 3)):
            if rng.random() < 0.1:
                islander = rng.choice(ISLANDERS)
                told = [text for (s, _), text in tellings().items() if s == islander]
                turns.append((f"tell me about {islander}.", said(", and ".join(rng.sample(told, 2)))))
            else:
                skill = rng.choices(("island", "manner"), (2, 1))[0]
                turns.append(rng.choice(ITEMS["train"][skill]))
        yield {"conversations": [{"role": role, "content": content} for question, answer in turns
                                 for role, content in (("user", rng.choice(CALLS).format(question)),
                                                       ("assistant", answer))]}


def persona_exercises(rng, size, split):
    """Held-out questions to the captain: up to `size` of each kind."""
    for skill, items in ITEMS[split].items():
        for question, answer in rng.sample(items, min(size, len(items))):
            yield {"skill": skill, "level": 1, "answer": answer, "checker": "exact", "max_new_tokens": 32,
                   "conversations": [{"role": "user", "content": rng.choice(CALLS).format(question)}]}
