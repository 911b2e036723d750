"""The rasteriser against pixels counted by hand and a loop in Python; what its parameters can reach; a run that leaves pictures."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from altgrad import pictures, registry, trainer
from altgrad.engine import Needs
from altgrad.engines.evolution import SPSA
from altgrad.errors import CapabilityError, NumericsError, SettingError, ShapeError, UsageError
from altgrad.problems.rasterizer import Rasterizer, RasterizerProblem
from altgrad.raster import Mesh, Renderer
from altgrad.raster.reach import Reach
from altgrad.raster.render import look_up
from altgrad.raster.scene import THINGS, painted, scene
from altgrad.rng import Key
from altgrad.training import TrainSettings
from altgrad.world import World
from tests.console import invoke
from tests.tolerances import tolerance

SMALL = {"image": 32, "texture": 24, "cells": 3, "reach": 0.1}


def mesh(triangles, vertices, *, depth=None, uv=None):
    """A mesh whose texture lies over a 16 x 16 image as it is, unless said otherwise."""
    places = torch.tensor(vertices, dtype=torch.float32)
    depths = torch.zeros(len(places)) if depth is None else torch.tensor(depth)
    return Mesh(torch.tensor(triangles), places.clamp(0, 16) / 16 if uv is None else torch.tensor(uv), depths), places


def drawn(triangles, vertices, *, size=16, **rest):
    """What is seen of a mesh."""
    found, places = mesh(triangles, vertices, **rest)
    return Renderer(found, size=size).buffers(places)


def counted(triangles, vertices, depth, uv, size):
    """Triangle and (u, v) of every pixel, one pixel and one triangle at a time in float64: barycentric coordinates by Cramer's rule."""
    seen, at = np.full((size, size), -1), np.zeros((size, size, 2))
    for row in range(size):
        for column in range(size):
            nearest = np.inf
            for number, corners in enumerate(triangles):
                a, b, c = (np.array(vertices[corner], dtype=float) for corner in corners)
                shares = np.linalg.solve(np.stack([b - a, c - a], 1), np.array([column + 0.5, row + 0.5]) - a)
                shares = np.array([1 - shares.sum(), *shares])
                z = shares @ np.array([depth[corner] for corner in corners])
                if (shares >= 0).all() and z < nearest:
                    nearest, seen[row, column] = z, number
                    at[row, column] = shares @ np.array([uv[corner] for corner in corners])
    return seen, at


def signs(params, seed, sigma):
    """Every parameter moved by + or - sigma."""
    generator = torch.Generator().manual_seed(seed)
    return {name: value + sigma * (2 * torch.randint(0, 2, value.shape, generator=generator) - 1) for name, value in params.items()}


def built(**settings):
    problem = Rasterizer(**{**SMALL, **settings}).build(Key(1))
    return problem, {name: value.detach() for name, value in problem.params().items()}, problem.batch(0, World())


def reached(found):
    """An influence map as [groups, P]."""
    mask = torch.zeros(found.count, 32 * 32, dtype=torch.bool)
    mask[found.groups, found.outputs] = True
    return mask


def beyond_the_map(problem, params, batch, *, sigma):
    """One parameter's sign turned while all have random ones: changed pixels outside its map, and changed pixels by parameter."""
    maps = {name: (found.index.reshape(-1), reached(found)) for name, found in problem.influence(params, batch).items()}
    generator, missed, changed = torch.Generator().manual_seed(3), 0, dict.fromkeys(params, 0)
    for seed in range(6):
        moved = signs(params, seed, sigma)
        before = problem.losses(moved, batch, {})[0]
        for name, value in moved.items():
            index, mask = maps[name]
            for number in torch.randint(value.numel(), (25,), generator=generator).tolist():
                other = value.clone()
                other.view(-1)[number] = 2 * params[name].view(-1)[number] - value.view(-1)[number]
                differs = problem.losses({**moved, name: other}, batch, {})[0] != before
                missed += int((differs & ~mask[index[number]]).sum())
                changed[name] += int(differs.sum())
    return missed, changed


# -- the renderer ----------------------------------------------------------------------------------------------------------------


def test_a_triangle_covers_the_pixels_whose_centres_are_inside():
    seen = drawn([[0, 1, 2]], [[2, 1], [7, 1], [2, 6]]).triangle
    expected = torch.full((16, 16), -1)
    for row, length in enumerate([5, 4, 3, 2, 1]):  # the slanted edge x + y = 8 runs through centres, which count
        expected[1 + row, 2 : 2 + length] = 0
    assert torch.equal(seen, expected)


def test_the_way_round_of_the_corners_does_not_matter():
    places = [[2, 1], [7, 1], [2, 6]]
    assert torch.equal(drawn([[0, 1, 2]], places).triangle, drawn([[0, 2, 1]], places).triangle)


def test_scattered_triangles_are_seen_as_a_loop_over_pixels_sees_them():
    generator = np.random.default_rng(4)
    vertices, depth, uv = generator.uniform(-3, 35, (24, 2)), generator.uniform(0, 1, 24), generator.uniform(0, 1, (24, 2))
    triangles = generator.permutation(24).reshape(8, 3)
    found, places = mesh(triangles.tolist(), vertices.tolist(), depth=depth.tolist(), uv=uv.tolist())
    seen = Renderer(found._replace(uv=found.uv.float(), depth=found.depth.float()), size=32).buffers(places)
    expected, at = counted(triangles, vertices, depth, uv, 32)
    assert len(np.unique(expected)) == 9  # every triangle is seen somewhere, and so is what is behind them
    assert np.array_equal(seen.triangle.numpy(), expected)
    np.testing.assert_allclose(seen.uv.numpy(), at, atol=10 * tolerance("rounding32"))  # slivers


def test_the_texture_lies_on_a_square_as_its_corners_say():
    seen = drawn([[0, 1, 2], [1, 3, 2]], [[0, 0], [16, 0], [0, 16], [16, 16]])
    centre = (torch.arange(16) + 0.5) / 16
    assert torch.allclose(seen.uv, torch.stack([centre.expand(16, 16), centre[:, None].expand(16, 16)], -1), atol=tolerance("rounding32"))


def test_two_triangles_that_share_an_edge_leave_no_gap():
    seen = drawn([[0, 1, 2], [1, 3, 2]], [[0, 0], [16, 0], [0, 16], [16, 16]]).triangle
    assert seen.unique().tolist() == [0, 1]


def test_triangles_that_cut_through_each_other_are_seen_where_they_are_nearer():
    corners = [[0, 0], [32, 0], [0, 32]]
    seen = drawn([[0, 1, 2], [3, 4, 5]], [*corners, *corners], depth=[0.0, 2.0, 0.0, 0.5, 0.5, 0.5]).triangle
    assert torch.equal(seen, (torch.arange(16) >= 8).long().expand(16, 16))  # depth x / 16 against 1 / 2


def test_of_two_equally_near_the_first_is_seen():
    corners = [[0, 0], [32, 0], [0, 32]]
    assert drawn([[0, 1, 2], [3, 4, 5]], [*corners, *corners]).triangle.unique().tolist() == [0]


@pytest.mark.parametrize("corners", [[[3, 3], [9, 9], [6, 6]], [[3, 3], [3, 3], [3, 3]], [[float("nan"), 1], [7, 1], [2, 6]]])
def test_a_triangle_without_an_area_is_not_seen(corners):
    assert drawn([[0, 1, 2]], corners).triangle.unique().tolist() == [-1]


def test_nearest_and_bilinear_read_a_texture_as_they_should():
    texture = torch.arange(4.0).view(2, 2, 1)
    middle, corner, between = torch.tensor([0.5, 0.5]), torch.tensor([0.1, 0.9]), torch.tensor([0.625, 0.25])
    assert [look_up(texture, place, lookup="nearest").item() for place in (corner, between)] == [2.0, 1.0]
    assert [look_up(texture, place, lookup="bilinear").item() for place in (middle, corner, between)] == [1.5, 2.0, 0.75]


@pytest.mark.parametrize("lookup", ["nearest", "bilinear"])
def test_images_under_vmap_are_those_of_a_loop(lookup):
    problem, params, _ = built(lookup=lookup)
    members = [signs(params, seed, 0.1) for seed in range(3)]
    together = torch.func.vmap(lambda values: problem.forward(values, None, {}))({name: torch.stack([own[name] for own in members]) for name in params})
    apart = torch.stack([problem.forward(own, None, {}) for own in members])
    assert len({float(image.sum()) for image in apart}) == 3
    assert torch.allclose(together, apart, atol=tolerance("rounding32"))


def test_the_scene_fills_the_image_and_shows_everything_in_it():
    found = scene(6)
    seen = Renderer(found.mesh, size=64, capacity=60).buffers(found.vertices * 64).triangle
    assert int(seen.min()) == 0
    for name in [*THINGS, "background"]:
        own = found.triangles_of[name]
        assert ((seen >= own.start) & (seen < own.stop)).sum() > 100


def test_the_scene_looks_alike_at_every_resolution():
    found = scene(4)
    large = Renderer(found.mesh, size=128, capacity=60).image(found.vertices * 128, painted(128))
    small = Renderer(found.mesh, size=64, capacity=60).image(found.vertices * 64, painted(64))
    assert (large.view(64, 2, 64, 2, 3).mean((1, 3)) - small).square().mean() < 0.02


# -- the problem -----------------------------------------------------------------------------------------------------------------


def test_the_defaults_train_more_than_a_hundred_thousand_parameters():
    assert sum(value.numel() for value in Rasterizer().build(Key(0)).params().values()) == 110766


def test_losses_are_one_a_pixel_and_their_mean_is_the_mean_square_error():
    problem, params, batch = built()
    losses = problem.losses(params, batch, {})
    image = problem.forward(params, batch.inputs, {})
    assert losses.shape == (1, 32 * 32)
    assert torch.allclose(losses.mean(), (image - problem.target).square().mean())
    assert torch.equal(losses[0, 5 * 32 + 7], (image[0, 5, 7] - problem.target[5, 7]).square().mean())


def test_the_true_parameters_have_no_loss():
    problem, _, batch = built()
    true = {"vertices": problem.scene.vertices * 32 / problem.settings.unit, "texture": painted(24)}
    assert problem.losses(true, batch, {}).max() == 0


def test_the_start_is_grey_and_off_by_at_most_the_jitter():
    problem, params, _ = built(jitter=3.0)
    off = (params["vertices"] * problem.settings.unit - problem.scene.vertices * 32).abs()
    assert 2.5 < off.max() <= 3.0 + 1e-5
    assert params["texture"].unique().tolist() == [0.5]


def test_the_key_decides_the_start_and_not_the_target():
    one, other = (Rasterizer(**SMALL).build(Key(seed)) for seed in (1, 2))
    assert not torch.equal(one.params()["vertices"], other.params()["vertices"])
    assert torch.equal(one.target, other.target)


def test_psnr_is_ten_decibels_for_a_tenth_of_the_greatest_error():
    problem, _, _ = built()
    found = problem.evaluate(lambda inputs: problem.target[None] + 0.1**0.5)
    assert found == pytest.approx({"psnr": 10.0, "loss": 0.1}, rel=1e-4)


def test_a_rasterizer_provides_values_and_no_gradient():
    assert built()[0].provides == Needs.VALUE


# -- credit ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"lookup": "bilinear"}, {"reach": 0.5, "jitter": 6.0}, {"unit": 8.0, "reach": 0.1, "jitter": 6.0}, {"texture": 60, "reach": 0.3}],
    ids=["nearest", "bilinear", "far", "coarse unit", "fine texture"],
)
def test_under_any_signs_of_all_parameters_one_changes_pixels_of_its_own_only(settings):
    problem, params, batch = built(**settings)
    missed, changed = beyond_the_map(problem, params, batch, sigma=problem.settings.reach)
    assert missed == 0
    assert min(changed.values()) > 20


def test_a_map_that_counts_on_smaller_moves_misses_pixels():
    problem, params, batch = built(reach=1e-3)
    assert beyond_the_map(problem, params, batch, sigma=0.1)[0] > 0


def test_what_a_pixel_reads_and_the_corners_it_belongs_to_are_in_its_map():
    problem, params, batch = built()
    seen = problem.renderer.buffers(params["vertices"] * problem.settings.unit)
    maps = {name: reached(found) for name, found in problem.influence(params, batch).items()}
    texels = (seen.uv[..., 1] * 24).long() * 24 + (seen.uv[..., 0] * 24).long()
    pixels = (seen.triangle.flatten() >= 0).nonzero().squeeze(1)
    assert len(pixels) > 900
    assert maps["texture"][texels.flatten()[pixels], pixels].all()
    for corner in problem.scene.mesh.triangles[seen.triangle.flatten()[pixels]].unbind(1):
        assert maps["vertices"][corner, pixels].all()


def test_a_pixel_is_credited_to_few_parameters_however_many_there_are():
    shared = {}
    for texels in (12, 48):
        problem, params, batch = built(texture=texels, reach=0.02)
        shared[texels] = reached(problem.influence(params, batch)["texture"]).sum(0).float().mean()
    assert shared[48] < 1.5 * shared[12] < 3


def test_spsa_gives_a_parameter_the_difference_of_its_own_pixels():
    problem, params, batch = built()
    engine = SPSA(noise="sign", sigma=0.1)
    grads = engine.estimate(problem, params, {}, batch, Key(5), World()).grads
    members = engine.draws(params, {}, Key(5)).chunk(0, 1).full
    plus, minus = (problem.losses({name: value[place] for name, value in members.items()}, batch, {})[0].double() for place in (0, 1))
    for name, found in problem.influence(params, batch).items():
        differences = (reached(found).double() @ (plus - minus))[found.index] / (0.2 * len(plus))
        expected = differences * torch.sign(members[name][0] - params[name])
        assert expected.abs().max() > 0
        assert torch.allclose(grads[name].double(), expected, rtol=1e-4, atol=1e-7)  # losses are float32


def spread(texels, *, credit, draws=24):
    """The mean square of the estimate, over that of its mean as credit finds it: 1 + the relative variance."""
    problem, params, batch = built(texture=texels, reach=0.02, credit=credit)
    engine = SPSA(noise="sign", sigma=0.02)
    found = [engine.estimate(problem, params, {}, batch, Key(seed), World()).grads["texture"].double() for seed in range(draws)]
    mean = torch.stack(found).sum(0).square().sum() - sum(grad.square().sum() for grad in found)
    return float(sum(grad.square().sum() for grad in found) / draws), float(mean / (draws * (draws - 1)))


def test_the_variance_with_credit_does_not_grow_with_the_number_of_parameters():
    few, many = (spread(texels, credit=True) for texels in (10, 40))  # 300 and 4,800 colours
    assert 0.5 < (many[0] / many[1]) / (few[0] / few[1]) < 2
    assert spread(40, credit=False)[0] / many[1] > 50 * many[0] / many[1]


def test_a_triangle_hidden_for_sure_is_credited_with_nothing():
    behind, before = [[4, 4], [10, 4], [4, 10]], [[-40, -40], [80, -40], [-40, 80]]
    found, places = mesh([[0, 1, 2], [3, 4, 5]], [*behind, *before], depth=[1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    vertices, _ = Reach(Renderer(found, size=16), places, move=0.5).of_vertices()
    assert vertices.unique().tolist() == [3, 4, 5]


def test_a_pixel_is_listed_once_for_each_vertex():
    problem, params, _ = built(reach=0.5)
    found = Reach(problem.renderer, params["vertices"] * 2, move=1.0)
    pairs = torch.stack(found.of_vertices(), 1)
    assert len(pairs.unique(dim=0)) == len(pairs)


def test_without_credit_there_is_no_map():
    problem, params, batch = built(credit=False)
    assert problem.influence(params, batch) == {}


def test_a_tile_with_too_many_triangles_is_said_once():
    problem, params, batch = built()
    together = {**params, "vertices": params["vertices"] * 0.3 + 2}
    with pytest.warns(UserWarning, match="triangles meet in one tile of 16 x 16 pixels, which has room for"):
        problem.influence(together, batch)
    problem.influence(together, batch)  # warnings are errors in this suite


# -- bad input -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"image": 100}, "image=100 is not allowed; it must be a multiple of 16"),
        ({"image": 0}, "image=0"),
        ({"texture": 2}, "texture=2"),
        ({"cells": 0}, "cells=0"),
        ({"lookup": "nearst"}, "Did you mean 'nearest'"),
        ({"jitter": -1.0}, "jitter=-1.0"),
        ({"unit": 0.0}, "unit=0.0"),
        ({"reach": float("nan")}, "reach=nan"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, match):
    with pytest.raises(SettingError, match=match):
        Rasterizer(**settings)


@pytest.mark.parametrize(("law", "needed"), [("sign", "0.2"), ("uniform", "0.3464"), ("normal", "0.8")])
def test_noise_that_moves_vertices_beyond_the_reach_is_refused_with_the_reach_it_needs(law, needed):
    settings = {"problem": "rasterizer", "problem_settings": SMALL, "engine": "spsa", "steps": 1}
    with pytest.raises(SettingError, match=f"Set the problem's reach to {needed} or more"):
        trainer.build(TrainSettings(**settings, engine_settings={"noise": law, "sigma": 0.2}))
    trainer.build(TrainSettings(**{**settings, "problem_settings": {**SMALL, "reach": 0.9}}, engine_settings={"noise": law, "sigma": 0.2}))


def test_noise_of_low_rank_is_refused_as_it_has_no_use_for_credit():
    settings = TrainSettings(problem="rasterizer", problem_settings=SMALL, engine="eggroll", engine_settings={"population": 2}, steps=1)
    with pytest.raises(UsageError, match=r"has .* groups, but the parameter's noise is .* of rank 1"):
        trainer.fit(trainer.build(settings))


def test_an_engine_that_needs_a_gradient_is_refused():
    with pytest.raises(CapabilityError, match="TANGENT"):
        trainer.build(TrainSettings(problem="rasterizer", problem_settings=SMALL, engine="forward"))


def test_processes_cannot_share_the_one_image():
    with pytest.raises(SettingError, match="there is one image"):
        built()[0].batch(0, World(rank=0, size=2))


# -- pictures and the command line -----------------------------------------------------------------------------------------------


def test_a_png_has_the_colours_of_the_picture():
    picture = torch.rand(5, 7, 3, generator=torch.Generator().manual_seed(0))
    read = np.asarray(Image.open(io.BytesIO(pictures.png(picture))))
    assert np.array_equal(read, (picture * 255).round().byte().numpy())


def test_colours_out_of_range_are_cut_off():
    picture = torch.tensor([[[-1.0, 2.0, float("nan")]]])
    assert np.asarray(Image.open(io.BytesIO(pictures.png(picture)))).tolist() == [[[0, 255, 0]]]


@pytest.mark.parametrize("picture", [torch.zeros(4, 4), torch.zeros(4, 4, 3, dtype=torch.uint8), [[0.0]]])
def test_what_is_no_picture_is_refused(picture):
    with pytest.raises(ShapeError, match="a picture is"):
        pictures.png(picture)


def test_the_command_line_trains_by_credited_pairs_unless_told_otherwise():
    assert registry.preferred("rasterizer") == {"engine": "spsa", "engine_settings": {"noise": "sign", "sigma": 0.05}, "schedule": "cosine"}
    assert registry.preferred("digits") == {"engine": "forward", "engine_settings": {}, "schedule": "constant"}
    found = json.loads(invoke("train", "--problem", "rasterizer", "-s", "population=4", "--dry-run", "--json").stdout)
    assert [found[name] for name in ("engine", "optimizer", "lr", "schedule")] == ["spsa", "Adam", 0.02, "cosine"]
    assert {name: found["engine_settings"][name] for name in ("noise", "sigma", "population")} == {"noise": "sign", "sigma": 0.05, "population": 4}


def test_another_engine_does_not_get_the_preferred_ones_settings():
    found = json.loads(invoke("train", "--problem", "rasterizer", "--engine", "es", "--problem-setting", "credit=false", "--dry-run", "--json").stdout)
    assert (found["engine"], found["engine_settings"]["noise"]) == ("es", "normal")


def test_a_run_leaves_the_image_sequence_and_gets_nearer_to_the_target(tmp_path, monkeypatch):
    monkeypatch.setattr(RasterizerProblem, "steps_per_epoch", 20)
    settings = [part for name, value in {"image": 32, "texture": 24, "cells": 3}.items() for part in ("--problem-setting", f"{name}={value}")]
    done = invoke("train", "--problem", "rasterizer", *settings, "--epochs", "2", "--out", str(tmp_path / "run"), "--json")
    found = sorted(path.name for path in (tmp_path / "run" / "pictures").iterdir())
    assert found == [*(f"image-{step:06d}.png" for step in (0, 20, 40)), "target-000000.png", *(f"texture-{step:06d}.png" for step in (0, 20, 40))]
    assert f"(7 pictures in {tmp_path / 'run' / 'pictures'})" in done.stderr
    target, *images = (np.asarray(Image.open(tmp_path / "run" / "pictures" / name), dtype=float) for name in ["target-000000.png", *found[:3]])
    errors = [np.square(image - target).mean() for image in images]
    assert errors[2] < errors[1] < errors[0]
    assert json.loads(done.stdout)["figures"]["test_psnr"] == pytest.approx(-10 * np.log10(errors[2] / 255**2), abs=0.1)


RUN = TrainSettings(
    problem="rasterizer", problem_settings={"image": 32, "texture": 8, "cells": 2}, engine="spsa", engine_settings={"noise": "sign", "sigma": 0.05}, steps=8
)


def test_a_resumed_run_leaves_the_pictures_of_one_that_never_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(RasterizerProblem, "steps_per_epoch", 4)
    trainer.fit(trainer.build(RUN), run_folder=tmp_path / "whole")
    trainer.fit(trainer.build(RUN), run_folder=tmp_path / "parts", on_step=lambda training, row: row["step"] == 4)
    trainer.fit(trainer.resume(tmp_path / "parts"))
    whole, parts = ({path.name: path.read_bytes() for path in (tmp_path / name / "pictures").iterdir()} for name in ("whole", "parts"))
    assert len(whole) == 7
    assert whole == parts


def test_a_run_that_fails_at_once_leaves_no_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(RasterizerProblem, "losses", lambda self, params, batch, buffers: torch.full((1, 1024), float("nan")) + 0 * params["texture"].sum())
    with pytest.raises(NumericsError):
        trainer.fit(trainer.build(RUN), run_folder=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_overwriting_a_run_takes_its_pictures_away(tmp_path):
    trainer.fit(trainer.build(RUN), run_folder=tmp_path / "run")
    trainer.fit(trainer.build(TrainSettings(steps=1)), run_folder=tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "pictures").exists()
