"""States on disk: nothing lost, nothing executed, damage noticed, and searches that go on to the same bits."""

import json

import numpy as np
import pytest
from es_runs import NAMES, advance, begin, build, same

from altgrad.errors import CheckpointError, SettingError
from altgrad.es import CMAES, SNES, functions, load, loop, minimize, save, storage

SUFFIXES = ["npz", "json"]


def part_told(strategy, state):
    population = strategy.ask(state)
    return strategy.tell(state, population[[1, 0]], functions.ellipsoid(population[[1, 0]]), index=[1, 0])


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", NAMES)
def test_a_stored_state_goes_on_to_the_same_bits(name, suffix, tmp_path):
    strategy = build(name)
    state = advance(strategy, begin(strategy), functions.ellipsoid, 7)
    stored, loaded = load(save(tmp_path / f"state.{suffix}", strategy, state))
    assert same(loaded, state)
    assert same(advance(stored, loaded, functions.ellipsoid, 7), advance(strategy, state, functions.ellipsoid, 7))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", NAMES)
def test_a_state_in_mid_generation_is_stored_with_what_was_told(name, suffix, tmp_path):
    strategy = build(name)
    state = part_told(strategy, begin(strategy))
    stored, loaded = load(save(tmp_path / f"state.{suffix}", strategy, state))
    assert same(loaded, state)
    rest = np.arange(2, len(state.told))
    population = stored.ask(loaded)[rest]
    fitness = functions.ellipsoid(population)
    assert same(stored.tell(loaded, population, fitness, index=rest), strategy.tell(state, population, fitness, index=rest))


def test_settings_are_stored_with_the_state(tmp_path):
    strategy = CMAES(sigma=0.25, population=11, active=False)
    stored, _ = load(save(tmp_path / "state.json", strategy, begin(strategy)))
    assert isinstance(stored, CMAES)
    assert (stored.sigma, stored.population, stored.active) == (0.25, 11, False)


def test_json_is_strict(tmp_path):
    path = save(tmp_path / "state.json", build("snes"), begin(build("snes")))

    def refuse(constant):
        raise AssertionError(constant)

    json.loads(path.read_text(), parse_constant=refuse)


def test_a_strategy_of_ones_own_is_given_to_load(tmp_path):
    class Own(SNES):
        name = "own"

    path = save(tmp_path / "state.npz", Own(sigma=1), begin(Own(sigma=1)))
    assert same(load(path, strategy=Own(sigma=1))[1], begin(Own(sigma=1)))


def test_a_state_of_another_strategy_is_refused(tmp_path):
    path = save(tmp_path / "state.npz", build("snes"), begin(build("snes")))
    with pytest.raises(CheckpointError, match="holds a state of snes, not of cma-es"):
        load(path, strategy=build("cma-es"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_changed_byte_is_noticed(suffix, tmp_path):
    path = save(tmp_path / f"state.{suffix}", build("snes"), begin(build("snes")))
    data = bytearray(path.read_bytes())
    place = data.find(np.float64(1.25).tobytes()) if suffix == "npz" else data.find(b"1.25")
    assert place > 0
    data[place + (6 if suffix == "npz" else 0)] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="damaged"):
        load(path)


@pytest.mark.parametrize(("place", "bit"), [(8, 1), (8, 32), (10, 1), (10, 8), (28, 1), (42, 1)], ids=str)
def test_a_changed_bit_in_the_directory_of_a_zip_is_damage(place, bit, tmp_path):
    path = save(tmp_path / "state.npz", build("snes"), begin(build("snes")))
    data = bytearray(path.read_bytes())
    data[data.find(b"PK\x01\x02") + place] ^= bit  # flags (encrypted, patched), method, length of the name, place in the file
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="damaged"):
        load(path)


def test_a_type_that_does_not_parse_is_damage(tmp_path):
    path = save(tmp_path / "state.json", build("snes"), begin(build("snes")))
    path.write_text(path.read_text().replace('"<f8"', '",f8"'))
    with pytest.raises(CheckpointError, match="damaged"):
        load(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"{}", b"nonsense", b"[1]"])
def test_a_foreign_file_is_named_as_such(suffix, content, tmp_path):
    path = tmp_path / f"state.{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged, or no state"):
        load(path)


def test_a_pickle_is_not_opened(tmp_path):
    path = tmp_path / "state.npz"
    np.savez(path, meta=np.array([{"a": 1}], dtype=object))
    with pytest.raises(CheckpointError, match="damaged"):
        load(path)


def test_a_newer_format_is_named(tmp_path):
    path = save(tmp_path / "state.json", build("snes"), begin(build("snes")))
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="format 99; this version of altgrad reads format 1"):
        load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no file"):
        load(tmp_path / "absent.npz")


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(SettingError, match=r"suffix '.pkl'; a state is kept as .npz or .json"):
        save(tmp_path / "state.pkl", build("snes"), begin(build("snes")))


# -- minimize --------------------------------------------------------------------------------------------------------------------


def searched(name, most, path=None, **options):
    options = {"restarts": "bipop", "bounds": (-4.0, 4.0), **options}
    return minimize(functions.rastrigin, np.full(2, 3.0), strategy=name, sigma=1.0, max_evaluations=most, vectorized=True, checkpoint=path, **options)


def test_a_search_with_restarts_goes_on_to_the_same_bits(tmp_path):
    path = tmp_path / "search.npz"
    begun = searched("cma-es", 500, path)
    resumed, whole = searched("cma-es", 2_000, path), searched("cma-es", 2_000)
    assert begun.evaluations < resumed.evaluations
    assert whole.restarts > 1
    np.testing.assert_array_equal(resumed.x, whole.x)
    assert same(resumed.state, whole.state)
    assert (resumed.evaluations, resumed.reason, resumed.generations, resumed.restarts) == (whole.evaluations, whole.reason, whole.generations, whole.restarts)


def test_a_search_killed_in_f_goes_on_from_its_last_checkpoint(tmp_path):
    path, calls = tmp_path / "search.json", []

    def killed(x):
        calls.append(1)
        if len(calls) == 255:
            raise KeyboardInterrupt
        return functions.sphere(x)

    arguments = {"strategy": "xnes", "sigma": 1.0, "max_evaluations": 600, "checkpoint": path}
    with pytest.raises(KeyboardInterrupt):
        minimize(killed, np.ones(3), **arguments)
    resumed = minimize(functions.sphere, np.ones(3), **arguments)
    whole = minimize(functions.sphere, np.ones(3), **{**arguments, "checkpoint": None})
    assert same(resumed.state, whole.state)


def test_slow_generations_are_all_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "PATIENCE", 0.0)
    path, calls = tmp_path / "search.npz", []

    def killed(x):
        calls.append(1)
        if len(calls) == 36:
            raise KeyboardInterrupt
        return functions.sphere(x)

    with pytest.raises(KeyboardInterrupt):
        minimize(killed, np.ones(3), sigma=1.0, max_evaluations=600, checkpoint=path)
    assert int(storage.read(path)[1]["evaluations"]) == 35


def test_a_search_that_is_done_stays_done(tmp_path):
    path = tmp_path / "search.npz"
    done = searched("cma-es", 20_000, path, restarts="none")
    again = searched("cma-es", 20_000, path, restarts="none")
    assert done.evaluations < 20_000
    assert (again.evaluations, again.reason) == (done.evaluations, done.reason)


def test_fewer_evaluations_than_were_made_end_the_search_at_once(tmp_path):
    path = tmp_path / "search.npz"
    searched("cma-es", 300, path)
    assert searched("cma-es", 100, path).reason == "The evaluations are spent: 300 of 100."


@pytest.mark.parametrize("changed", [{"seed": 1}, {"restarts": "ipop"}, {"bounds": (-4.0, 5.0)}, {"population": 9}, {"maximize": True}, {"label": "f"}])
def test_a_checkpoint_of_another_search_is_refused(changed, tmp_path):
    path = tmp_path / "search.npz"
    searched("cma-es", 300, path)
    with pytest.raises(CheckpointError, match="is of another search"):
        searched("cma-es", 600, path, **changed)


def test_a_stored_state_is_no_checkpoint_of_a_search(tmp_path):
    path = save(tmp_path / "state.npz", build("cma-es"), begin(build("cma-es")))
    with pytest.raises(CheckpointError, match="a state of a strategy, not a search"):
        searched("cma-es", 300, path)
