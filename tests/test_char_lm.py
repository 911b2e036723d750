"""Next-character prediction: numbers of characters, sequences, the bigram entropy, vmap, and what happens without a text. No network: texts are tiny."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from altgrad import data, models, sources, text
from altgrad.errors import DataError, SettingError, ShapeError, UsageError
from altgrad.networks import Window
from altgrad.problems.char_lm import CharacterModel, sequences
from altgrad.rng import Key
from altgrad.world import World
from tests.tolerances import tolerance

WORDS = "the whale and the sea; call me what you will. a sailor sees the sea, and the sea sees him — so it is. "
TEXT = "".join(WORDS[i % 7 :] for i in range(40))


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """A folder of the user's with a text in it."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "moby-dick.txt").write_bytes(TEXT.encode())
    return tmp_path / "mine"


@pytest.fixture
def problem(folder):
    return CharacterModel(context=16, batch_size=4).build(Key(0), data_dir=folder)


def moved(problem, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator) for name, p in problem.params().items()}


# -- text ------------------------------------------------------------------------------------------------------------------------


def test_a_corpus_is_its_text_in_numbers_the_last_tenth_set_aside():
    found = text.corpus("toy", TEXT)
    spelled = "".join(found.characters[number - 1] for number in torch.cat([found.train, found.test]).tolist())
    assert spelled == TEXT
    assert len(found.test) == len(TEXT) // 10
    assert found.vocabulary == len(set(TEXT)) + 1


def test_a_character_that_only_the_test_text_has_is_unseen():
    assert text.corpus("toy", "ab" * 9 + "zb").test.tolist() == [text.UNSEEN, 2]


def test_the_bigram_entropy_is_that_of_counts():
    found = text.corpus("toy", TEXT)
    train = TEXT[: len(found.train)]
    pairs, firsts = Counter(pairwise(train)), Counter(train[:-1])
    expected = -sum(count / (len(train) - 1) * math.log(count / firsts[first]) for (first, _), count in pairs.items())
    assert math.isclose(text.bigram_entropy(found.train, found.vocabulary), expected, rel_tol=tolerance("rounding64"))


def test_the_bigram_entropy_of_what_one_character_decides_is_nothing():
    assert abs(text.bigram_entropy(torch.tensor([1, 2, 3] * 50), 4)) < tolerance("rounding64")


def test_the_bigram_entropy_of_fair_coins_is_one_bit():
    coins = torch.from_numpy(np.random.default_rng(0).integers(0, 2, 200_000))
    assert abs(text.bigram_entropy(coins, 2) - math.log(2)) < 1e-4  # its bias is about 1 / 200,000


def test_a_text_that_is_not_utf8_is_read_as_latin1_and_lines_end_in_one_character():
    assert text.decoded("é\r\nb\rc".encode("latin-1")) == "é\nb\nc"


def test_a_missing_text_says_how_to_get_it():
    with pytest.raises(DataError, match=r"moby-dick is missing.*Run: altgrad data get moby-dick; or put a text called moby-dick.txt into a folder"):
        CharacterModel().build(Key(0))


def test_a_folder_without_the_text_names_the_places_looked_at(tmp_path):
    with pytest.raises(DataError, match=r"moby-dick/moby-dick.txt or .*moby-dick.txt\."):
        CharacterModel().build(Key(0), data_dir=tmp_path)


def test_a_damaged_text_in_the_cache_is_refused(tmp_path):
    home = tmp_path / "cache" / "altgrad" / "data" / "moby-dick"
    home.mkdir(parents=True)
    (home / "moby-dick.txt").write_text(TEXT)
    with pytest.raises(DataError, match="damaged or another version"):
        text.load("moby-dick")


def test_a_text_is_found_in_a_folder_of_its_name_too(folder):
    (folder / "moby-dick").mkdir()
    (folder / "moby-dick.txt").rename(folder / "moby-dick" / "moby-dick.txt")
    assert len(text.load("moby-dick", data_dir=folder).train) == len(TEXT) - len(TEXT) // 10


@pytest.mark.parametrize("name", text.CORPORA)
def test_every_corpus_pins_a_version_its_package_file_and_its_text(name):
    known = sources.SETS[name]
    assert list(known.files) == [f"{name}.txt"]
    assert all(len(pin) == 64 for pin in [*known.files.values(), *(source.sha256 for source in known.sources)])
    assert all("@" in source.package.lstrip("@") for source in known.sources)
    assert f"{name}.txt" in sources.USUAL[name]


def test_books_become_one_text_in_alphabetical_order():
    assert sources.one_text("a.txt")({"books/b.txt": b"two", "books/a.txt": b"one "}) == {"a.txt": b"one two"}


@pytest.mark.parametrize("ask", [data.load, data.shape_of])
def test_a_text_is_not_read_as_images(ask):
    with pytest.raises(UsageError, match=r"moby-dick is a text.*char-lm"):
        ask("moby-dick")


# -- problem ---------------------------------------------------------------------------------------------------------------------


def test_sequences_are_followed_by_their_next_characters():
    inputs, targets = sequences("toy", torch.arange(11), 3)
    assert inputs.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert targets.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_a_batch_has_sequences_and_what_follows(problem):
    batch = problem.batch(0, World())
    assert batch.inputs.shape == batch.targets.shape == (4, 16)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])


def test_the_loss_of_a_sequence_is_its_mean_cross_entropy(problem):
    batch, params = problem.batch(0, World()), moved(problem, 0)
    logits = problem.forward(params, batch.inputs, {}).transpose(1, 2)  # [N, places, characters]
    expected = -torch.log_softmax(logits, -1).gather(-1, batch.targets[..., None])[..., 0].mean(1)
    assert torch.allclose(problem.losses(params, batch, {}), expected, rtol=tolerance("rounding32"))


def test_losses_under_vmap_are_those_of_a_loop(problem):
    batch, members = problem.batch(0, World()), [moved(problem, seed) for seed in range(3)]
    stacked = {name: torch.stack([member[name] for member in members]) for name in members[0]}
    together = torch.func.vmap(lambda params: problem.losses(params, batch, {}))(stacked)
    apart = torch.stack([problem.losses(member, batch, {}) for member in members])
    assert together.shape == (3, 4)
    assert torch.allclose(together, apart, rtol=tolerance("rounding32"))
    assert len(apart.flatten().unique()) == 12


def test_a_prediction_depends_on_the_window_before_it_alone(problem):
    inputs = problem.batch(0, World()).inputs[:1]
    changed = inputs.clone()
    changed[0, 6] = inputs[0, 6] % (problem.classes - 1) + 1
    before, after = (problem.forward(problem.params(), x, {}) for x in (inputs, changed))
    touched = (before != after).any(1)[0].nonzero().flatten().tolist()
    assert touched == [6, 7, 8]  # the default window looks at three characters


def test_evaluation_is_the_mean_loss_over_every_character_of_the_test_text(problem):
    found = problem.evaluate(problem.predict, chunk=3)
    outputs = problem.predict(problem.dataset.test_inputs)
    loss = float(nn.functional.cross_entropy(outputs, problem.dataset.test_targets).detach())
    assert math.isclose(found["loss"], loss, rel_tol=tolerance("rounding32"))
    assert math.isclose(found["bits_per_character"], loss / math.log(2), rel_tol=tolerance("rounding32"))
    assert math.isclose(found["accuracy"], float((outputs.argmax(1) == problem.dataset.test_targets).float().mean()), rel_tol=tolerance("rounding32"))
    assert found["bigram_entropy"] == problem.bigram_entropy == text.bigram_entropy(problem.corpus.train, problem.corpus.vocabulary)


def test_a_long_test_text_is_sampled_evenly(folder, monkeypatch):
    monkeypatch.setattr("altgrad.problems.char_lm.TEST_SEQUENCES", 3)
    found = CharacterModel(context=16).build(Key(0), data_dir=folder)
    whole = sequences("toy", found.corpus.test, 16)[0]
    assert len(whole) > 8
    assert torch.equal(found.dataset.test_inputs, whole[[0, (len(whole) - 1) // 2, len(whole) - 1]])


def test_a_model_of_the_default_size_on_moby_dick_has_3884_parameters():
    model = models.build("window", CharacterModel.model_settings, input_shape=(64,), classes=84, key=Key(0))
    assert sum(p.numel() for p in model.parameters()) == 84 * 6 + (18 * 32 + 32) + (32 * 84 + 84) == 3884


def test_backprop_gets_below_the_bigram_entropy(problem):
    params = {name: p.detach().clone().requires_grad_() for name, p in problem.params().items()}
    optimizer = torch.optim.Adam(params.values(), lr=0.02)
    for step in range(150):
        optimizer.zero_grad()
        problem.losses(params, problem.batch(step, World()), {}).mean().backward()
        optimizer.step()
    found = problem.evaluate(lambda inputs: problem.forward(params, inputs, {}))
    assert found["loss"] < found["bigram_entropy"]


def test_the_check_of_a_first_batch_passes(problem):
    problem.check_batch(problem.batch(0, World()))


def test_a_model_whose_outputs_have_another_shape_is_refused_before_training(problem):
    problem.model = nn.Embedding(problem.classes, problem.classes)
    with pytest.raises(ShapeError, match=r"it must return \[1, \d+, 16\]"):
        problem.check_batch(problem.batch(0, World()))


def test_a_model_of_images_is_refused_and_those_that_read_characters_are_named(folder):
    with pytest.raises(UsageError, match=r"the model gru does not read characters. Use one of: window"):
        CharacterModel().build(Key(0), model="gru", data_dir=folder)


def test_a_window_that_is_given_pixels_says_what_it_reads():
    with pytest.raises(UsageError, match="reads characters"):
        models.build("window", input_shape=(64,), classes=10, key=Key(0))(torch.zeros(2, 64))


def test_the_window_takes_its_size_and_widths():
    model = Window(size=6, width=5, hidden="12-7").build((16,), 9)
    assert [tuple(p.shape) for p in model.parameters() if p.ndim == 2] == [(9, 5), (12, 30), (7, 12), (9, 7)]


@pytest.mark.parametrize("wrong", [{"context": 0}, {"batch_size": 0}])
def test_a_setting_out_of_range_is_refused(wrong):
    with pytest.raises(SettingError, match=next(iter(wrong))):
        CharacterModel(**wrong)


def test_an_unknown_corpus_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'moby-dick'"):
        CharacterModel(corpus="mobydick")


def test_a_text_that_is_too_short_for_the_context_is_refused(folder):
    with pytest.raises(DataError, match="too short for one sequence of 5000"):
        CharacterModel(context=5000).build(Key(0), data_dir=folder)
