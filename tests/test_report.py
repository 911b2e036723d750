"""Tables, files, plots and the page."""

import html.parser
import io
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from altgrad import durable, errors, registry, report, runs, tables, trainer
from altgrad.compare import Choice, CompareSettings, compare
from altgrad.training import TrainSettings

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def found():
    """A small comparison with a label that has to be escaped."""
    engines = (Choice("forward", "forward", {"tangents": 2}), Choice("<b>sign & co</b>", "forward", {"tangents": 2, "noise": "sign"}))
    return compare(CompareSettings(problem="blobs:Blobs", engines=engines, seeds=(0, 1), budget="epochs=1", lrs=(0.01, 0.03), points=4))


@pytest.fixture(scope="module")
def page(found):
    return report.page(found)


@pytest.fixture(scope="module")
def run_folders(tmp_path_factory):
    """Two short runs."""
    folder = tmp_path_factory.mktemp("runs")
    for engine in ("forward", "backprop"):
        trainer.fit(trainer.build(TrainSettings(problem="blobs:Blobs", engine=engine, epochs=2)), run_folder=folder / engine)
    return folder / "forward", folder / "backprop"


class Reader(html.parser.HTMLParser):
    """Tags that are open, addresses, and the text."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.closed_wrongly, self.addresses, self.text, self.tags = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in {"src", "srcset", "href", "action", "data"}]
        if tag not in {"meta", "img", "source", "br", "link"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open.pop() != tag:
            self.closed_wrongly.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader


def test_the_page_is_well_formed(page):
    reader = read(page)
    assert reader.open == []
    assert reader.closed_wrongly == []


def test_the_page_fetches_nothing(page):
    words = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)  # a picture may hold any four letters by chance
    assert "http" not in words
    assert "url(" not in words
    assert not {"script", "link", "iframe"} & set(read(page).tags)
    assert all(address.startswith("data:image/png;base64,") for address in read(page).addresses)


def test_the_page_names_every_engine_and_escapes_labels(found, page):
    text = "".join(read(page).text)
    assert all(row.label in text for row in found.rows)
    assert "<b>" not in page


def test_the_page_has_every_plot_for_light_and_for_dark(page):
    assert len(read(page).addresses) == 2 * len(report.PLOTS)
    assert page.count("(prefers-color-scheme: dark)") == 1 + len(report.PLOTS)
    assert len(set(read(page).addresses)) == 2 * len(report.PLOTS)


def test_the_page_says_how_it_was_measured_with_what_and_who_won(found, page):
    text = "".join(read(page).text)
    assert all(sentence in text for sentence in [*found.method, *found.verdict()])
    assert found.environment["torch"] in text
    assert '"tangents": 2' in text


def test_json_comes_back_as_it_was(found, tmp_path):
    assert report.from_json(report.to_json(found, tmp_path / "a.json")).as_dict() == found.as_dict()


@pytest.mark.parametrize("text", ["{}", "[1]", "no json", '{"rows": [{"label": "x"}], "settings": {}, "environment": {}, "method": [], "skipped": {}}'])
def test_json_of_something_else_is_refused(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(errors.AltgradError, match="is no comparison"):
        report.from_json(tmp_path / "a.json")


def test_csv_comes_back_as_it_was(found, tmp_path):
    expected = [{name: value for name, value in row.items() if name != "curves"} for row in found.as_dict()["rows"]]
    assert report.from_csv(report.to_csv(found, tmp_path / "a.csv")) == json.loads(json.dumps(expected))


def test_a_label_with_commas_quotes_and_line_breaks_survives_csv(found, tmp_path):
    odd = replace(found, rows=[replace(found.rows[0], label='a,"b"\n1')])
    assert report.from_csv(report.to_csv(odd, tmp_path / "a.csv"))[0]["label"] == 'a,"b"\n1'


def test_a_figure_that_is_not_finite_is_absent_in_json(found, tmp_path):
    odd = replace(found, rows=[replace(found.rows[0], loss=float("nan"))])
    path = report.to_json(odd, tmp_path / "a.json")
    assert "NaN" not in path.read_text()
    assert report.from_json(path).rows[0].loss is None


def test_a_write_that_fails_leaves_the_old_file(found, tmp_path, monkeypatch):
    path = report.to_json(found, tmp_path / "a.json")
    before = path.read_bytes()

    def fail(path, data):
        path.write_bytes(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "write", fail)
    with pytest.raises(errors.AltgradError, match="disk is full"):
        report.to_json(replace(found, method=[]), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_everything_is_written(found, tmp_path):
    names = {path.name for path in report.write(found, tmp_path / "new" / "folder")}
    plots = {f"{name}.png" for name in ("accuracy-against-forwards", "accuracy-against-seconds", "costs", "layers")}
    assert names == {"comparison.json", "comparison.csv", "table.md", "report.html"} | plots
    assert all((tmp_path / "new" / "folder" / name).stat().st_size > 200 for name in names)


def test_without_matplotlib_the_figures_are_written_and_the_extra_is_named(found, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(errors.MissingExtraError, match=r"altgrad\[plot\]"):
        report.write(found, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"comparison.json", "comparison.csv", "table.md"}


def test_plots_leave_the_readers_settings_alone_and_are_not_moved_by_them(found):
    import matplotlib

    before = report.costs(found)
    with matplotlib.rc_context({"lines.linewidth": 31.0, "axes.facecolor": "red", "font.size": 31.0}):
        settings = dict(matplotlib.rcParams)
        assert report.costs(found) == before
        assert dict(matplotlib.rcParams) == settings


@pytest.mark.parametrize("name", list(report.PLOTS))
def test_a_plot_is_a_png_and_differs_between_light_and_dark(name, found):
    light, dark = (report.PLOTS[name][1](found, theme=theme) for theme in ("light", "dark"))
    assert light.startswith(PNG)
    assert dark.startswith(PNG)
    assert light != dark


def test_a_dark_plot_is_dark_all_over(found):
    import matplotlib.image

    pixels = matplotlib.image.imread(io.BytesIO(report.curves(found, against="forwards", theme="dark")))[..., :3]
    assert np.median(pixels) < 0.2


def test_plots_of_losses_can_be_drawn(found):
    curves = [[{name: value for name, value in point.items() if name != "test_accuracy"} for point in curve] for curve in found.rows[0].curves]
    lossy = replace(found, rows=[replace(row, accuracy=None, accuracies=[], curves=curves) for row in found.rows])
    assert report.curves(lossy, against="seconds").startswith(PNG)


def test_curves_of_seeds_meet_on_common_points_and_end_with_the_shortest(found):
    def curve(*points):
        return [{"step": x, "forwards": x, "backwards": 0, "seconds": x, "test_accuracy": y} for x, y in points]

    row = replace(found.rows[0], curves=[curve((0, 0.0), (2, 0.2), (4, 0.4)), curve((0, 0.0), (3, 0.6))])
    x, values = report.common(row, "test_accuracy", "forwards")
    assert x.tolist() == [0, 2, 3]
    np.testing.assert_allclose(values, [[0, 20, 30], [0, 40, 60]])


def test_an_engine_of_a_hundred_steps_and_one_of_ten_thousand_are_drawn_on_a_logarithmic_axis(found):
    def curve(scale):
        return [{"step": s, "forwards": s * scale, "backwards": 0, "seconds": s, "test_accuracy": 0.1 * s} for s in range(5)]

    near = replace(found, rows=[replace(row, curves=[curve(1)]) for row in found.rows])
    far = replace(found, rows=[replace(row, curves=[curve(1 + 99 * (not row.baseline))]) for row in found.rows])
    assert not report.wide([report.common(row, "test_accuracy", "forwards")[0] for row in near.rows])
    assert report.wide([report.common(row, "test_accuracy", "forwards")[0] for row in far.rows])


def test_the_table_fits_a_terminal_of_80_and_keeps_numbers_whole(found):
    big = [replace(row, forwards=20001.0, backwards=6667.0, accuracy=0.9583, accuracy_spread=0.0083) for row in found.rows[:3]]
    console = Console(width=80, file=io.StringIO())
    console.print(report.table(big))
    text = console.file.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert text.count("95.83 % ± 0.83") == text.count("20,001 + 6,667") == 3


def test_the_table_has_a_row_for_every_engine(found):
    assert report.table(found.rows).row_count == len(found.rows) == 5


def test_labels_are_not_read_as_markup(found):
    console = Console(width=120, file=io.StringIO())
    console.print(report.table([replace(found.rows[0], label="forward[red]")]))
    assert "forward[red]" in console.file.getvalue()


def test_markdown_has_as_many_cells_in_every_line(found):
    lines = report.markdown([replace(found.rows[0], label="a|b"), *found.rows[1:]]).splitlines()
    assert len(lines) == 2 + len(found.rows)
    assert {line.replace("\\|", "").count("|") for line in lines} == {len(tables.COLUMNS) + 1}


def test_a_diverged_row_says_so_in_its_cell(found):
    assert "(1 of 2 diverged)" in report.cells(replace(found.rows[0], diverged=1))[1]


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 * 2**20, "3.0 MiB"), (5 * 2**30, "5.00 GiB")])
def test_bytes_are_given_in_a_fitting_unit(count, text):
    assert tables.size(count) == text


def test_the_table_of_engines_has_every_engine():
    text = report.engine_table()
    assert all(f"| `{name}` |" in text for name in registry.names("engine"))
    assert len(text.splitlines()) == 2 + len(registry.names("engine"))


def test_a_run_folder_gets_its_plot(run_folders):
    path = report.plot_run(run_folders[0])
    assert path == run_folders[0] / "plot.png"
    assert path.read_bytes().startswith(PNG)


def test_a_second_run_changes_the_plot_of_the_first_folder_only(run_folders):
    alone = report.plot_run(run_folders[0]).read_bytes()
    assert report.plot_run(run_folders[0], beside=run_folders[1]).read_bytes() != alone
    assert not (run_folders[1] / "plot.png").exists()


def test_a_run_whose_loss_became_null_can_still_be_drawn(run_folders, tmp_path):
    folder = runs.create(tmp_path / "a", {"engine": "forward", "problem": "blobs"}).folder
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null}\n{"step": 2, "test_loss": null}\n')
    assert report.plot_run(folder).read_bytes().startswith(PNG)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(errors.UsageError, match="is no run folder"):
        report.plot_run(tmp_path)


def test_the_running_mean_of_a_line_is_the_line():
    line = np.arange(400.0)
    np.testing.assert_allclose(report.smooth(line)[10:-10], line[10:-10])
