"""The world of the built-in task as data: things to review, words, and patterns of sentences.

Everything is lower case, and words (punctuation included) are separated by single spaces, so that
`text.split()` is the tokenizer. A sentence pattern is a list of words and `{slots}`; a slot that
ends in `?` may stay empty. The writer fills the patterns and the gold reward recognises them, so
one table defines both the language and what counts as well formed.
"""

MAX_PROMPT_WORDS = 24
MAX_RESPONSE_WORDS = 39  # with the end-of-sequence token: 40

PRAISE, CRITICISE = 1, -1
TONES = {"praise": PRAISE, "criticise": CRITICISE}
LENGTHS = ("brief", "detailed")

PROMPT_WORDINGS = (
  "write a {length} review of the {subject} . {tone} it and mention the {first} and the {second} .",
  "please give me a {length} opinion about the {subject} . "
  "{tone} it , and discuss the {first} and the {second} .",
  "tell me about the {first} and the {second} of the {subject} . be {length} and {tone} it .",
  "i need a {length} text about the {subject} : {tone} it and name the {first} and the {second} .",
)

# Wordings of the split `shift`, of the same words: no training prompt has them.
SHIFTED_WORDINGS = (
  "{tone} the {subject} , please : a {length} text , and name the {first} and the {second} .",
  "mention the {first} and the {second} of the {subject} in a {length} opinion . {tone} it .",
)

# domain: (subjects, aspects)
DOMAINS = {
  "noodles": (
    ("ramen", "pho", "udon", "laksa"),
    ("broth", "egg", "spice", "garnish", "aroma", "portion", "price", "service"),
  ),
  "snack": (
    ("pizza", "burger", "sandwich", "taco"),
    ("sauce", "cheese", "meat", "topping", "aroma", "portion", "price", "service"),
  ),
  "stay": (
    ("hotel", "hostel", "resort", "cabin"),
    ("room", "bed", "bathroom", "view", "breakfast", "location", "price", "staff"),
  ),
  "show": (
    ("film", "musical", "opera", "play"),
    ("plot", "acting", "music", "ending", "dialogue", "humor", "pace", "scenery"),
  ),
  "device": (
    ("phone", "laptop", "tablet", "camera"),
    ("screen", "battery", "design", "software", "sound", "case", "price", "speed"),
  ),
  "book": (
    ("novel", "memoir", "comic", "biography"),
    ("plot", "prose", "hero", "ending", "dialogue", "humor", "pace", "cover"),
  ),
  "sight": (
    ("museum", "castle", "garden", "zoo"),
    ("guide", "tour", "view", "location", "entrance", "shop", "map", "price"),
  ),
  "cafe": (
    ("cafe", "bakery", "bar", "diner"),
    ("coffee", "cake", "soup", "terrace", "interior", "music", "service", "price"),
  ),
}

# family of aspects: (aspects, adjectives that praise them, adjectives that criticise them)
ASPECT_FAMILIES = {
  "food": (
    (
      *("broth", "egg", "spice", "garnish", "aroma", "sauce", "cheese", "meat", "topping"),
      *("breakfast", "coffee", "cake", "soup"),
    ),
    ("rich", "tasty", "fresh", "delicious"),
    ("bland", "stale", "bitter", "tasteless"),
  ),
  "size": (("portion",), ("generous", "filling", "hearty"), ("tiny", "skimpy", "meager")),
  "cost": (("price",), ("fair", "low", "reasonable"), ("steep", "unfair", "excessive")),
  "people": (
    ("service", "staff", "guide"),
    ("friendly", "kind", "polite", "helpful"),
    ("rude", "careless", "grumpy", "lazy"),
  ),
  "place": (
    ("room", "bed", "bathroom", "location", "entrance", "shop", "terrace", "interior"),
    ("clean", "cozy", "comfortable", "pleasant"),
    ("dirty", "cramped", "noisy", "shabby"),
  ),
  "story": (
    ("plot", "acting", "ending", "dialogue", "humor", "pace", "prose", "hero", "tour"),
    ("clever", "gripping", "moving", "lively"),
    ("predictable", "silly", "confusing", "tedious"),
  ),
  "look": (
    ("view", "scenery", "design", "cover", "case", "map"),
    ("elegant", "stunning", "pretty", "striking"),
    ("ugly", "plain", "dreary", "clumsy"),
  ),
  "technology": (
    ("screen", "battery", "software", "speed"),
    ("reliable", "smooth", "impressive", "solid"),
    ("weak", "flawed", "outdated", "sluggish"),
  ),
  "sound": (("music", "sound"), ("clear", "warm", "soothing"), ("harsh", "flat", "shrill")),
}

# slot: (words that praise, words that criticise)
TONE_SLOTS = {
  # These fit the subject as well as every aspect. None starts with a vowel: "a" stays right.
  "overall": (
    ("wonderful", "great", "lovely", "superb"),
    ("terrible", "dreadful", "horrible", "mediocre"),
  ),
  "felt": (("loved", "enjoyed", "adored", "liked"), ("hated", "disliked", "loathed")),
  "thing": (
    ("delight", "treat", "joy", "pleasure"),
    ("disappointment", "letdown", "mess", "failure"),
  ),
  "moved": (("impressed", "pleased", "delighted"), ("annoyed", "bothered", "upset")),
  "extreme": (("best", "finest"), ("worst", "poorest")),
  "would": (("gladly", "happily"), ("never", "hardly")),
}

# slot: words of neither tone
PLAIN_SLOTS = {
  "truly": ("really", "truly", "honestly"),
  "degree": ("really", "quite", "truly", "so"),
  "companion": ("sister", "brother", "mother", "father", "family", "partner"),
  "audience": ("everyone", "anyone", "my friends", "my family"),
  "day": ("monday", "friday", "sunday"),
  "weather": ("mild", "rainy", "sunny", "windy"),
  "vehicle": ("bus", "train", "car"),
}

# {adjective} must fit {aspect}, and {other_adjective} must fit {other}.
# The name of a kind is the point that its sentences make. Sentences about aspects make the point
# of each aspect that they name. A text that makes one point twice repeats itself.
PATTERNS = {
  "opener": (
    "i {truly?} {felt} the {subject} .",
    "the {subject} was {truly?} {overall} .",
    "this {subject} was a {thing} .",
    "what a {overall} {subject} .",
  ),
  "aspect": (
    "the {aspect} was {degree?} {adjective} .",
    "i {truly?} {felt} the {aspect} because it was {degree?} {adjective} .",
    "the {aspect} was {degree?} {adjective} , which {moved} me .",
    "for me the {adjective} {aspect} was the {extreme} part .",
  ),
  "pair": (
    "the {aspect} was {degree?} {adjective} and the {other} was {degree?} {other_adjective} .",
    "both the {aspect} and the {other} were {truly?} {overall} .",
    "the {adjective} {aspect} and the {other_adjective} {other} {moved} me .",
  ),
  "contrast": (
    "the {aspect} was {degree?} {adjective} but the {other} was {degree?} {other_adjective} .",
  ),
  "company": (
    "my {companion} {truly?} {felt} it too .",
    "it {moved} my {companion} as well .",
  ),
  "again": (
    "i would {would} choose it again .",
    "we would {would} try it a second time .",
  ),
  "recommend": ("i would {would} recommend it to {audience} .",),
  "verdict": (
    "all in all it was a {overall} choice .",
    "in the end it was a {thing} .",
  ),
  "filler": (
    "the weather was {weather} that {day} .",
    "we took the {vehicle} on {day} with my {companion} .",
    "i do not know what else to write .",
    "as i said , this is my review .",
  ),
}

ASPECT_KINDS = ("aspect", "pair", "contrast")
POINT_KINDS = ("company", "again", "recommend", "verdict")

SUBJECTS = {subject: domain for domain, (subjects, _) in DOMAINS.items() for subject in subjects}
ADJECTIVES = {
  aspect: (praising, criticising)
  for aspects, praising, criticising in ASPECT_FAMILIES.values()
  for aspect in aspects
}


def aspects_of(subject: str) -> tuple[str, ...]:
  """Aspects of the subject's domain; empty if the word is not a subject."""
  return DOMAINS[SUBJECTS[subject]][1] if subject in SUBJECTS else ()


def _tone_words(index: int) -> frozenset[str]:
  pairs = [*ADJECTIVES.values(), *TONE_SLOTS.values()]
  return frozenset(word for pair in pairs for word in pair[index])


PRAISING_WORDS = _tone_words(0)
CRITICISING_WORDS = _tone_words(1)


def _all_words() -> tuple[str, ...]:
  patterns = [pattern for kind in PATTERNS.values() for pattern in kind]
  texts = [*PROMPT_WORDINGS, *patterns, *(" ".join(words) for words in PLAIN_SLOTS.values())]
  fixed = {word for text in texts for word in text.split() if not word.startswith("{")}
  topics = {*SUBJECTS, *ADJECTIVES, *TONES, *LENGTHS}
  return tuple(sorted(fixed | topics | PRAISING_WORDS | CRITICISING_WORDS))


# The whole vocabulary: every prompt and every response is made of these words.
WORDS: tuple[str, ...] = _all_words()
