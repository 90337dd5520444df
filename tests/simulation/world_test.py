from rlhf_jax.simulation import world


def test_words_are_sorted_unique_lower_case_and_free_of_spaces():
  assert list(world.WORDS) == sorted(set(world.WORDS))
  assert all(word == word.lower() and len(word.split()) == 1 for word in world.WORDS)
  assert 200 <= len(world.WORDS) <= 300


def test_no_word_both_praises_and_criticises():
  assert not world.PRAISING_WORDS & world.CRITICISING_WORDS


def test_topics_carry_no_tone():
  topics = {*world.SUBJECTS, *world.ADJECTIVES}
  assert not topics & (world.PRAISING_WORDS | world.CRITICISING_WORDS)
  assert not set(world.SUBJECTS) & set(world.ADJECTIVES)


def test_fixed_words_of_patterns_carry_no_tone():
  patterns = [pattern for kind in world.PATTERNS.values() for pattern in kind]
  words = {word for pattern in patterns for word in pattern.split()}
  assert not words & (world.PRAISING_WORDS | world.CRITICISING_WORDS)


def test_each_aspect_is_in_one_family_and_every_family_is_used():
  in_families = [aspect for aspects, _, _ in world.ASPECT_FAMILIES.values() for aspect in aspects]
  in_domains = {aspect for _, aspects in world.DOMAINS.values() for aspect in aspects}
  assert len(in_families) == len(set(in_families))
  assert set(in_families) == in_domains
