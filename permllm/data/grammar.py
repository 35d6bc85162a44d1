"""Stories of a small grammar of English, made from a seed, by which `model=tiny` was trained."""

import random
import re

# Words of each part of speech. All nouns have a plural, and all verbs a third person, with "s".
WORDS = {
    "animal": "bird cat cow dog duck goat hen horse lion owl pig rabbit robin snake swan tiger",
    "person": "baker doctor driver farmer king lawyer miller painter queen sailor singer teacher",
    "thing": "apple basket bell boat book bottle candle chair clock coat door drum flower hammer"
    " key lamp letter map mirror pen plate ring rope shoe spoon table window",
    "place": "barn bridge castle field forest garden harbour hill house island kitchen lake market"
    " mountain park river road school shop station street tower village",
    "colour": "black blue brown golden green grey pink purple red silver white yellow",
    "size": "big heavy huge little long low narrow short small tall tiny wide",
    "feeling": "afraid brave calm happy hungry lonely proud sad sleepy tired worried",
    "act": "draw find follow hide hold like lose need open paint pull remember sell take want",
    "go": "climb crawl dance jump ride run sail sleep swim wait walk wander",
    "near": "above behind below beside inside near outside under",
    "when": "today tomorrow now then later often sometimes",
    "how": "alone bravely carefully gladly loudly quickly quietly slowly",
    "number": "two three four five six seven eight nine ten",
}
# A part with a 1 is a word that the whole story keeps; `who` is an animal or a person.
SENTENCES = """
    the {who1} {act}s the {colour1} {thing1} .
    the {who1} {act}s the {colour1} {thing1} {near} the {place1} .
    {when} the {who1} {go}s {how} to the {place1} .
    the {size} {who1} is {feeling1} because the {thing1} is {colour1} .
    {number} {animal}s {go} {near} the {place1} .
    {number} {person}s {act} the {thing1} , but the {who1} {go}s {how} .
    if the {who1} is {feeling1} , the {person}s {act} the {thing1} .
    the {thing1} of the {who1} is {size} and {colour1} .
    in the {place1} there is a {size} {thing} , and the {who1} {act}s it .
    who {act}s the {colour1} {thing1} ? the {feeling1} {who1} {act}s it .
    the {colour} {thing} is {near} the {place} , and the {colour1} {thing1} is {near} the {place1} .
    the {person} says : " the {who1} is {feeling1} , and {how} it {go}s {near} the {place1} . "
""".strip().splitlines()
SENTENCES_IN_A_STORY = 6


def stories(seed: str, count: int) -> list[str]:
    """Return stories about one animal or person each, other ones for each seed."""
    generator = random.Random(seed)
    return [_story(generator) for _ in range(count)]


def _story(generator: random.Random) -> str:
    words = {part: text.split() for part, text in WORDS.items()}
    words["who"] = words["animal"] + words["person"]
    fixed = {part: generator.choice(choices) for part, choices in words.items()}

    def word(match: re.Match[str]) -> str:
        part, is_fixed = match.groups()
        return fixed[part] if is_fixed else generator.choice(words[part])

    patterns = generator.choices(SENTENCES, k=SENTENCES_IN_A_STORY)
    return re.sub(r"\{([a-z]+)(1?)\}", word, " ".join(pattern.strip() for pattern in patterns))
