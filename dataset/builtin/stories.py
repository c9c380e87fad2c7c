"""Fluent text about the world: life stories, small stories, guides to towns and animals, and easy conversation.

Stories agree with the facts: people live in their towns, eat what they like and meet their friends, so that a fact is
met in many contexts.
"""

from dataset.builtin.world import ANIMALS, BOYS, COLOURS, FACTS, PEOPLE, THINGS, TOWNS, pronoun, value_of

TIMES = ("One day", "One morning", "One evening", "On a sunny day", "On a rainy day", "In the winter", "In the spring",
         "Last summer", "Early in the morning", "After lunch")
FEELINGS = ("happy", "glad", "pleased", "delighted")
TROUBLES = ("sad", "tired", "worried", "lost", "cold", "hungry")
ADJECTIVES = ("little", "big", "old", "new", "pretty", "funny", "small", "shiny")
ENDINGS = ("It was a good day.", "They laughed all the way home.", "That night {a} slept well.",
           "And they were friends.", "{a} never forgot that day.", "The next day they met again.",
           "So everyone was {glad}.", "{a} was {glad}.")


def article(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


def story(rng):
    """A short story, 40 to 90 words, about two people (friends, half of the time), an animal and a thing."""
    a = rng.choice(PEOPLE)
    b = value_of(a, "friend") if rng.random() < 0.5 else rng.choice([p for p in PEOPLE if p != a])
    animal = rng.choice(list(ANIMALS))
    place, diet, look = ANIMALS[animal]
    thing, adjective, colour = rng.choice(THINGS), rng.choice(ADJECTIVES), rng.choice(COLOURS)
    he, she = pronoun(a), pronoun(b)
    names = {"a": a, "b": b, "he": he, "He": he.capitalize(), "him": "him" if a in BOYS else "her",
             "his": "his" if a in BOYS else "her", "her": "his" if b in BOYS else "her", "she": she,
             "She": she.capitalize(), "animal": animal, "place": place, "diet": diet, "look": look, "thing": thing,
             "an_thing": article(adjective + " " + thing), "colour": colour, "town": value_of(a, "home"),
             "other_town": value_of(b, "home"), "food": value_of(a, "food"), "other_food": value_of(b, "food"),
             "pet": value_of(a, "pet"), "job": value_of(a, "job"), "glad": rng.choice(FEELINGS),
             "sad": rng.choice(TROUBLES), "time": rng.choice(TIMES), "n": str(rng.randint(2, 9))}
    sentences = [rng.choice(part) for part in (OPENINGS, *rng.choice(PLOTS), ENDINGS)]
    return " ".join(sentences).format(**names)


OPENINGS = (
    "{time} {a} went for a walk near {town}.", "{a} lives in {town} and works as a {job}. {time} {he} was {sad}.",
    "{time} {a} and {b} met in {town}.", "{a} has a pet {pet}. {time} they went out to play.",
    "{time} {a} wanted to visit {b} in {other_town}.", "{time} {a} sat by the window and looked at the rain.",
    "There was a {job} in {town}. The name of the {job} was {a}.", "{time} {a} made a plan with {b}.",
)
PLOTS = (
    (("{He} found {an_thing} under a tree.", "On the road {he} saw {an_thing}.", "There {he} found {an_thing}."),
     ('"Whose {thing} is this?" asked {a}.', '{a} wanted to know whose {thing} it was.'),
     ('"It is mine!" said {b}. "I lost it in {other_town}."', "It was the {thing} of {b}, who lives in {other_town}."),
     ('"Thank you, {a}," said {b}.', "{b} thanked {him} and gave {him} some {food}."),),
    (("{He} heard a sound. It was the {animal} from the {place}.", "In the {place} {he} met a {look} {animal}."),
     ("The {animal} was {sad}.", "The {animal} looked at {a} and did not move."),
     ('"Do you want some {diet}?" asked {a}.', "{a} knew that the {animal} eats {diet}."),
     ("So {he} gave it some, and the {animal} was {glad}.", "The {animal} ate and went back to the {place}."),),
    (("{a} was hungry and wanted to eat {food}.", "{a} likes to eat {food}, but there was nothing left at home."),
     ('"I only have {other_food}," said {b}.', "{b} had {other_food} and {she} gave some to {a}."),
     ("They sat down and ate together.", "They shared everything and talked for a long time."),
     ('"Next time we eat {food}," said {a}.', '"You are a good friend," said {a}.'),),
    (("The {pet} of {a} ran away.", "But then the {pet} was gone."),
     ("{a} and {b} looked for it in {town}.", "{He} looked behind the house, but it was not there.",
      '"Did you see my {pet}?" asked {a}.'),
     ("At last they found the {pet} near the {thing} of {b}.", "{b} heard it behind {an_thing}.",
      "The {pet} was asleep behind {an_thing}."),
     ("The {pet} was {glad} to see {a}.", "{a} gave the {pet} some {food}."),),
    (("{b} wanted to learn what a {job} does.", "{b} asked {a} for help."),
     ('"I am a {job}," said {a}. "I can show you."', "{a} took {an_thing} and began to work."),
     ("It was not easy, and {b} was {sad}.", "First {b} made {n} mistakes."),
     ("But {she} tried again, and then it was right.", '"Well done," said {a}.'),),
    (("{He} had {an_thing}, and it was {colour}.", "{a} made {an_thing} for {b} and painted it {colour}."),
     ("But then it fell and broke.", "The wind took the {thing} and it was gone."),
     ('"Do not be sad," said {b}. "We can make a new one."', "{b} saw that {a} was {sad}."),
     ("They worked for {n} hours, and the new {thing} was even better.", "Together they made {n} new ones."),),
    (("They wanted to see the {animal} that lives in the {place}.", "{a} told {b} about a {look} {animal}."),
     ("They walked for {n} hours.", "The way to the {place} was long."),
     ('"Look, there it is!" said {b}.', "In the {place} they sat down and waited."),
     ("The {animal} was {look} and it ate {diet}.", "Then the {animal} came and ate some {diet}."),),
)


def life(rng):
    """All that is known about one person, in any order and any wording."""
    person = rng.choice(PEOPLE)
    return tell_all(rng, [fact for fact in FACTS if fact.subject == person])


def guide(rng):
    """All that is known about a town (and who lives there) or about a few animals."""
    if rng.random() < 0.5:
        town = rng.choice(TOWNS)
        known = [fact for fact in FACTS if fact.subject == town]
        known += [fact for fact in FACTS if fact.relation.name == "home" and fact.value == town]
    else:
        animals = rng.sample(list(ANIMALS), 2)
        known = [fact for fact in FACTS if fact.subject in animals]
    return tell_all(rng, known)


def list_of_facts(rng):
    """Facts that have nothing to do with each other."""
    return tell_all(rng, rng.sample(FACTS, 8))


def counting(rng):
    """Numbers in order: what comes after 9, 19, 99."""
    start = rng.randint(0, 99)
    return " ".join(map(str, range(start, start + rng.randint(10, 25))))


def tell_all(rng, known):
    known = list(known)
    rng.shuffle(known)
    between = rng.choice(("\n", "\n", " "))            # each on a line of its own, as an answer is, or running text
    return between.join(fact.told(rng.choice((0, 0, *range(1, len(fact.relation.told))))) for fact in known)


# --- conversation: who Acorn is, and small talk

NAME_ANSWER = "I am Acorn, a small language model that learned everything on your computer."
SMALL_TALK = (
    (("Who are you?", "What is your name?", "Tell me about yourself.", "What are you?", "Introduce yourself."),
     (NAME_ANSWER,)),
    (("Who made you?", "Where do you come from?", "How did you learn?", "Where did you learn all this?"),
     ("I am Acorn. I was trained from nothing on this computer.",)),
    (("Are you a human?", "Are you a robot?", "Are you a person?"), ("No, I am Acorn, a small language model.",)),
    (("What can you do?", "Help", "How can you help me?", "What do you know?"),
     ("I can count, sort, spell, do sums, tell stories and talk about my little world.",)),
    (("Hello", "Hello!", "Hi", "Hi there!", "Good morning!", "Hey"),
     ("Hello! How can I help you?", "Hello! I am Acorn. What shall we do?")),
    (("How are you?", "How are you today?", "Are you well?"), ("I am fine, thank you. How are you?",)),
    (("I am fine.", "I am happy today.", "Today is a good day."), ("I am glad to hear that!",)),
    (("I am sad.", "I am tired.", "I had a bad day."), ("I am sorry to hear that. Shall I tell you a story?",)),
    (("Thank you!", "Thanks!", "Thank you, Acorn.", "That was good."), ("You are welcome!",)),
    (("Goodbye!", "Bye!", "See you!", "Good night!"), ("Goodbye! Come back soon.",)),
)
STORY_REQUESTS = ("Tell me a story.", "Please tell me a short story.", "Can you tell me a story?", "A story, please!")
UNKNOWN = ("What is the capital of France?", "What is the weather today?", "Who won the game?", "What time is it?",
           "Who is the president?", "What is the meaning of life?", "Can you write a poem?", "How far is the moon?")
STRANGERS = ("Zork", "Bella", "Viktor", "Quentin", "Hilda", "Yann", "Greta", "Wilbur", "Dora", "Igor")


def conversation(rng):
    """One or a few turns of talk, a list of messages."""
    messages = []
    while not messages or rng.random() < 0.5:
        kind = rng.choices((small_talk, tell_story, stranger, about, remember), (50, 15, 10, 20, 5))[0]
        for turn, said in enumerate(kind(rng)):
            messages.append({"role": ("user", "assistant")[turn % 2], "content": said})
    return messages


def small_talk(rng):
    asked, answered = rng.choice(SMALL_TALK)
    question = rng.choice(asked)
    if rng.random() < 0.2:                             # as people type
        question = question.lower().rstrip("?!.")
    return question, rng.choice(answered)


def tell_story(rng):
    return rng.choice(STORY_REQUESTS), story(rng)


def stranger(rng):
    """What lies outside of the little world."""
    if rng.random() < 0.4:
        return rng.choice(UNKNOWN), "I do not know that. I only know my little world."
    person = rng.choice(STRANGERS)
    question = rng.choice(("Who is {}?", "Where does {} live?", "What does {} like to eat?")).format(person)
    return question, f"I do not know {person}."


def about(rng):
    """Facts about somebody, some place or some animal; held-out ones too, since nobody has asked for them."""
    subject = rng.choice([fact.subject for fact in FACTS])
    known = [fact for fact in FACTS if fact.subject == subject]
    named = f"the {subject}" if subject in ANIMALS else subject
    return f"Tell me about {named}.", " ".join(fact.statement for fact in rng.sample(known, min(3, len(known))))


def remember(rng):
    """Two exchanges: what was said before is still known."""
    name = rng.choice(PEOPLE + STRANGERS)
    return f"My name is {name}.", f"Nice to meet you, {name}!", "What is my name?", f"Your name is {name}."
