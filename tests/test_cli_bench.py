"""`altgrad bench lowrank`."""

import json

import pytest
from console import invoke

SMALL = ["--width", "16", "--members", "4", "--repeats", "1"]


def test_bench_lowrank_reports_every_ratio_as_json():
    done = invoke("bench", "lowrank", *SMALL, "--json")
    found = json.loads(done.stdout)
    assert all(found[name] > 0 for name in ("noise_before", "noise_on_the_way", "update", "update_drawn_again"))
    assert found["settings"]["members"] == 4


def test_bench_lowrank_prints_a_table():
    assert "share of plain inference" in invoke("bench", "lowrank", *SMALL).stdout


@pytest.mark.parametrize(
    ("wrong", "said"),
    [(["--members", "3"], "even"), (["--rank", "16"], "below the width"), (["--law", "norml"], "Did you mean 'normal'"), (["--dtype", "int8"], "float32")],
)
def test_bench_lowrank_refuses_settings_out_of_range(wrong, said):
    done = invoke("bench", "lowrank", *SMALL, *wrong)
    assert done.exit_code == 2
    assert said in done.stderr
