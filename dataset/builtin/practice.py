"""Practice: exercises a little harder than those of fine-tuning, which reinforcement learning can make routine.

A model that was taught words of three to seven letters answers with eight sometimes: right answers turn up among its
samples, so practice has something to reward. That is what reinforcement learning needs and supervised learning does not
(nobody writes the answers down here): a skill between hardly ever and nearly always. One letter more, and it is never.

These skills (PRACTISED) are none of SKILLS: no record of pretraining or fine-tuning holds them. `world.split_of`
divides their words as it does those of SKILLS, so a held-out word is in no training prompt.
"""

from dataset.builtin.skills import Task, made_up_word, skill, spaced

PRACTISED = {}


def long_word(rng, level):
    """(a word, how it is shown): eight letters spelled out, six letters whole, seven letters whole."""
    word = made_up_word(rng, (8, 6, 7)[level - 1])
    return word, spaced(word) if level == 1 else word


@skill("letters", ("Reverse: {shown}", "Say {shown} backwards."), levels=3, max_new_tokens=24, skills=PRACTISED)
def reverse_long(rng, level):
    word, shown = long_word(rng, level)
    return Task(f"word:{word}", {"shown": shown}, spaced(word[::-1]))


@skill("letters", ("Upper case: {shown}", "Write {shown} in capital letters."), levels=3, max_new_tokens=24,
       skills=PRACTISED)
def upper_case_long(rng, level):
    word, shown = long_word(rng, level)
    return Task(f"word:{word}", {"shown": shown}, spaced(word.upper()))


@skill("letters", ("Repeat: {shown}", "Please repeat {shown}"), max_new_tokens=24, skills=PRACTISED)
def copy_long(rng, level):
    word, shown = long_word(rng, 1)
    return Task(f"word:{word}", {"shown": shown}, shown)


@skill("letters", ("Spell: {word}", "How do you spell {word}?"), levels=2, max_new_tokens=24, skills=PRACTISED)
def spell_long(rng, level):
    word = made_up_word(rng, 6 + level)
    return Task(f"word:{word}", {"word": word}, spaced(word))


@skill("number", ("Count {letter} in: {shown}", "How many times is {letter} in {shown}?"), levels=2, max_new_tokens=8,
       skills=PRACTISED)
def count_letter_long(rng, level):
    """Eight or nine letters, up to half of them the same."""
    letters = list(made_up_word(rng, 7 + level))
    letter = rng.choice(letters)
    for place in rng.sample(range(len(letters)), rng.randint(0, len(letters) // 2)):
        letters[place] = letter
    word = "".join(letters)
    return Task(f"word:{word}", {"letter": letter, "shown": spaced(word)}, str(word.count(letter)))
