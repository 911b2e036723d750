"""`altgrad es`: what it prints, what it writes, how it goes on, and its exit codes."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from console import elsewhere, environment, invoke

from altgrad import report_es
from altgrad.es import functions, minimize

__all__ = ["elsewhere"]  # a fixture for every test

QUIET = ("es", "--quiet")


@pytest.fixture
def unplotted(monkeypatch):
    """No picture: drawing one takes longer than the search."""
    monkeypatch.setattr(report_es, "convergence", lambda rows, **labels: b"")


def result(*arguments):
    shown = invoke(*QUIET, "--json", *arguments)
    assert shown.exit_code == 0, shown.output
    return json.loads(shown.stdout)


def test_the_search_is_that_of_minimize():
    found = result("--function", "rosenbrock", "--strategy", "cma-es", "--dimension", "5", "--sigma", "0.3", "--seed", "4")
    expected = minimize(functions.rosenbrock, np.zeros(5), sigma=0.3, target=1e-9, max_evaluations=100_000, seed=4)
    assert found["x"] == expected.x.tolist()
    assert (found["fun"], found["evaluations"], found["reason"], found["reached"]) == (expected.fun, expected.evaluations, expected.reason, True)


def test_json_is_one_line():
    assert invoke(*QUIET, "--json", "--function", "sphere").stdout.count("\n") == 1


def test_the_reason_comes_first_for_readers():
    lines = invoke(*QUIET, "--function", "sphere", "--dimension", "3").stdout.splitlines()
    assert lines[0].startswith("The target 1e-09 was reached")
    assert lines[1].startswith("f = ")
    assert lines[2].startswith("x = ")


def test_settings_bounds_and_restarts_reach_the_search():
    found = result("--function", "rastrigin", "--dimension", "3", "--x0", "3", "--sigma", "2", "--bounds=-4,4", "--restarts", "ipop", "-s", "active=false")
    expected = minimize(
        functions.rastrigin, np.full(3, 3.0), sigma=2.0, bounds=(-4, 4), restarts="ipop", target=1e-9, max_evaluations=100_000, settings={"active": False}
    )
    assert found["x"] == expected.x.tolist()
    assert found["restarts"] == expected.restarts > 0


def test_a_function_of_ones_own_is_searched(tmp_path, monkeypatch):
    (tmp_path / "simulator.py").write_text("def cost(x):\n    return float((x[0] - 3) ** 2 + (x[1] + 1) ** 2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = result("--function", "simulator:cost", "--x0", "0.5,2", "--evaluations", "600")
    np.testing.assert_allclose(found["x"], [3, -1], atol=1e-3)


def test_a_maximum_is_searched_on_request(tmp_path, monkeypatch):
    (tmp_path / "wind_tunnel.py").write_text("def gain(population):\n    return 5 - (population ** 2).sum(1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert result("--function", "wind_tunnel:gain", "--x0", "1,1", "--vectorized", "--maximize", "--target", "4.999")["fun"] >= 4.999


def test_a_folder_holds_log_plot_result_and_state(tmp_path):
    found = result("--function", "sphere", "--dimension", "4", "--out", tmp_path / "a")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"log.csv", "plot.png", "result.json", "state.npz"}
    rows = report_es.from_csv((tmp_path / "a" / "log.csv").read_bytes())
    assert rows[-1]["best"] == found["fun"]
    assert [row["generation"] for row in rows] == list(range(1, found["generations"] + 1))
    assert json.loads((tmp_path / "a" / "result.json").read_text()) == found
    assert (tmp_path / "a" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_search_comes_to_the_same_bits_and_the_same_log(tmp_path, unplotted):
    common = ("--function", "ellipsoid", "--dimension", "4")
    result(*common, "--evaluations", "333", "--out", tmp_path / "a")
    resumed, whole = result(*common, "--out", tmp_path / "a", "--resume"), result(*common, "--out", tmp_path / "b")
    assert resumed == whole
    assert (tmp_path / "a" / "log.csv").read_bytes() == (tmp_path / "b" / "log.csv").read_bytes()


def test_a_search_whose_f_breaks_off_leaves_the_log_of_every_generation(tmp_path, monkeypatch):
    (tmp_path / "odd.py").write_text("seen = []\ndef f(x):\n    seen.append(1)\n    return 'a' if len(seen) > 45 else float(x @ x)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert invoke(*QUIET, "--function", "odd:f", "--x0", "1,1,1", "--out", tmp_path / "a").exit_code == 2
    rows = report_es.from_csv((tmp_path / "a" / "log.csv").read_bytes())
    assert [row["evaluations"] for row in rows] == [7, 14, 21, 28, 35, 42]


def test_a_log_cut_short_is_gone_on_with(tmp_path, unplotted):
    common = ("--function", "sphere", "--dimension", "2")
    result(*common, "--evaluations", "96", "--out", tmp_path / "a")
    log = tmp_path / "a" / "log.csv"
    log.write_bytes(log.read_bytes()[:-7])
    result(*common, "--out", tmp_path / "a", "--resume", "--evaluations", "120")
    assert [row["generation"] for row in report_es.from_csv(log.read_bytes())] == [*range(1, 16), *range(17, 21)]


def test_a_search_on_another_function_is_not_gone_on_with(tmp_path, unplotted):
    result("--function", "sphere", "--evaluations", "100", "--out", tmp_path / "a")
    shown = invoke(*QUIET, "--function", "ellipsoid", "--out", tmp_path / "a", "--resume")
    assert shown.exit_code == 4
    assert "function 'sphere' instead of 'ellipsoid'" in shown.stderr


def test_an_interrupted_search_leaves_its_folder_and_can_go_on(tmp_path):
    (tmp_path / "slow.py").write_text("import time\ndef f(x):\n    time.sleep(0.002)\n    return float(x @ x)\n")
    command = [sys.executable, "-m", "altgrad", "es", "-q", "--function", "slow:f", "--dimension", "3", "--target", "1e-300", "--out", "a"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**environment(), "PYTHONPATH": str(tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 30
    while not (tmp_path / "a" / "state.npz").exists() and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Interrupted: stopped after" in errors
    assert "--resume" in errors
    assert (tmp_path / "a" / "result.json").is_file()
    assert (tmp_path / "a" / "log.csv").is_file()


def test_progress_goes_to_stderr(monkeypatch):
    from altgrad import cli_progress

    monkeypatch.setattr(cli_progress, "PAUSE", 0.0)
    shown = invoke("es", "--function", "sphere", "--dimension", "3")
    assert "sphere, cma-es: evaluation: 7 of 100000, best" in shown.stderr
    assert "evaluation:" not in shown.stdout


def test_the_listing_names_strategies_and_functions():
    shown = invoke("es", "--list").stdout
    assert all(name in shown for name in ("sep-cma-es", "random-search", "max_dimension", "rotated-ellipsoid"))
    listed = json.loads(invoke("es", "--list", "--json").stdout)
    assert len(listed["strategies"]) == 11
    assert all(entry["summary"] for entry in listed["strategies"].values())


WRONG = [
    (("--function", "rosenbrok"), "Did you mean 'rosenbrock'?"),
    (("--strategy", "cmaes"), "Did you mean 'cma-es'?"),
    (("--sigma", "0"), "sigma=0.0 is not allowed"),
    (("--set", "actve=1"), "Did you mean 'active'?"),
    (("--set", "active"), "not of the form name=value"),
    (("--x0", "1,2", "--dimension", "3"), "--x0 has 2 numbers and --dimension is 3"),
    (("--x0", "1,b"), "--x0 '1,b' is not a list of numbers"),
    (("--bounds", "1"), "--bounds '1' is not allowed"),
    (("--bounds", "2,3"), "x0[0]=0 is not allowed"),
    (("--bounds", "0,1", "--bounds-kind", "reflex"), "Did you mean 'reflect'?"),
    (("--bounds-kind", "clip"), "--bounds-kind clip has no bounds to keep"),
    (("--x0", "inf,1"), "--x0 'inf,1' is not finite"),
    (("--function", "rosenbrock", "--dimension", "1"), "--dimension 1 is not allowed; rosenbrock needs 2"),
    (("--evaluations", "5"), "less than one generation of 10"),
    (("--restarts", "x"), "restarts='x' is not allowed"),
    (("--function", "json:nothing"), "unknown attribute 'nothing'"),
    (("--function", "no_such_module:f"), "there is no module 'no_such_module'"),
    (("--function", "math:pi"), "must be a function"),
    (("--resume",), "--resume needs --out"),
    (("--resume", "--out", "absent"), "holds no state.npz"),
    (("--strategy", "cma-es", "--dimension", "3001"), "sep-cma-es"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, words):
    shown = invoke("es", *arguments)
    assert shown.exit_code == 2
    assert words in shown.stderr
    assert len(shown.stderr.strip().splitlines()) == 1


def test_a_function_that_never_works_leaves_exit_code_3():
    shown = invoke("es", "-q", "--function", "os:getcwd", "--dimension", "2")
    assert shown.exit_code == 3
    assert "no evaluation of os:getcwd gave a finite number" in shown.stderr
    assert "TypeError" in shown.stderr


def test_a_folder_in_use_is_left_alone(tmp_path, unplotted):
    result("--function", "sphere", "--out", tmp_path / "a")
    assert "is not empty" in invoke(*QUIET, "--function", "sphere", "--out", tmp_path / "a").stderr
    assert invoke(*QUIET, "--function", "sphere", "--out", tmp_path / "a", "--overwrite").exit_code == 0
    (tmp_path / "a" / "thesis.tex").write_text("years of work")
    shown = invoke(*QUIET, "--function", "sphere", "--out", tmp_path / "a", "--overwrite")
    assert shown.exit_code == 2
    assert (tmp_path / "a" / "thesis.tex").is_file()


def test_a_state_of_another_search_is_exit_code_4(tmp_path, unplotted):
    result("--function", "sphere", "--out", tmp_path / "a")
    assert invoke(*QUIET, "--function", "sphere", "--seed", "1", "--out", tmp_path / "a", "--resume").exit_code == 4


def test_without_matplotlib_there_is_a_warning_and_all_else(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    shown = invoke("es", "--function", "sphere", "--out", tmp_path / "a")
    assert shown.exit_code == 0
    assert "Warning: there is no plot" in shown.stderr
    assert (tmp_path / "a" / "log.csv").is_file()


def test_the_command_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; from altgrad.cli import cli; cli(['es', '-q', '--function', 'sphere', '--out', 'a'], standalone_mode=False)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment())
    assert shown.returncode == 0, shown.stderr
