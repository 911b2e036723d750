r"""A triangle rasteriser to be fitted to a target image: nothing in it has a derivative, and each parameter reaches a few pixels only.

    ℓ_p = Σ_channels (image_p - target_p)² / 3,     L = Σ_p ℓ_p / P,     PSNR = -10 log₁₀ L   (decibels; colours are in [0, 1])

Parameters: `vertices` [V, 2] (x, y) in units of `unit` pixels, so that one sigma and one learning rate suit them and the colours; `texture` [H, W, 3].
The loss of the one image is [1, P], a loss a pixel, and `influence` says which pixels each vertex and each texel can reach.

The map holds for moves of a vertex coordinate up to `reach` (in the parameter's unit). Sign noise moves every one by exactly sigma, so reach = sigma
makes it exact: for any signs of all parameters, changing one changes pixels of its own only.

Source: Deliot, Heitz, Belcour, "Transforming a Non-Differentiable Rasterizer into a Differentiable One with Stochastic Gradient Estimation",
I3D 2024, arXiv 2404.09758.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from altgrad import rng
from altgrad.credit import Influence
from altgrad.engine import Engine, Tree
from altgrad.errors import SettingError, near_miss, require
from altgrad.problem import Batch, Problem
from altgrad.raster import Renderer
from altgrad.raster.reach import Reach
from altgrad.raster.render import LOOKUPS, TILE
from altgrad.raster.scene import painted, scene
from altgrad.rng import Key, tensor_id
from altgrad.world import World

SPARE = 4.0  # pixels: tiles have room for the triangles that would touch them if all corners were so far off
GREY = 0.5  # the colour of the texture at the start
LARGEST = {"sign": 1.0, "uniform": math.sqrt(3), "normal": 4.0}  # times sigma, by the law of the noise; of normal noise one draw in 16,000 is larger


class RasterizerProblem(Problem):
    """The shipped scene, to be found again from a grey texture and vertices that are off."""

    name = "rasterizer"
    differentiable = False
    steps_per_epoch = 50

    def __init__(self, settings: "Rasterizer", key: Key):
        self.settings = settings
        size, unit = settings.image, settings.unit
        found = scene(settings.cells)
        vertices = found.vertices * size  # [V, 2] in pixels
        off = torch.from_numpy(rng.uniform(key.fold("start"), tensor_id("vertices"), [0], vertices.numel())[0]).view_as(vertices)
        start = vertices + settings.jitter * (2 * off - 1)
        roomy = Renderer(found.mesh, size=size, lookup=settings.lookup)
        room = max(int(roomy.touching(place, roomy.planes(place), margin=SPARE).sum(1).max()) for place in (vertices, start))
        self.renderer = Renderer(found.mesh, size=size, capacity=room, lookup=settings.lookup)
        self.scene = found
        self.vertices = nn.Parameter(start / unit)
        self.texture = nn.Parameter(torch.full((settings.texture, settings.texture, 3), GREY))
        self.target = self.renderer.image(vertices, painted(settings.texture))  # [S, S, 3]

    def params(self) -> Tree:
        return {"vertices": self.vertices, "texture": self.texture}

    def batch(self, step: int, world: World) -> Batch:
        """The one image: inputs [1] is its number, 0."""
        require(world.size == 1, "the number of processes", world.size, "1: there is one image, so its pixels are not divided; divide a population")
        target = self.target.to(self.texture.device)
        return Batch(torch.zeros(1, dtype=torch.int64, device=target.device), target[None])

    def forward(self, params: Tree, inputs: Any, buffers: Tree) -> Any:
        """The image [1, S, S, 3]."""
        return self.renderer.image(params["vertices"] * self.settings.unit, params["texture"])[None]

    def losses(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        """The mean square error of the colours at every pixel, [1, P], rows first."""
        return self.score(self.forward(params, batch.inputs, buffers), batch.targets)

    def score(self, outputs: Any, targets: Any) -> Tensor:
        """Square errors [1, P] of images against targets [1, S, S, 3]."""
        return (outputs - targets).square().mean(-1).flatten(1)

    def influence(self, params: Tree, batch: Batch) -> Mapping[str, Influence]:
        """Which pixels each vertex (both of its coordinates) and each texel (all of its channels) can reach, as long as no coordinate moves by more
        than `reach`; without the setting `credit` none are told apart."""
        if not self.settings.credit:
            return {}
        vertices, texture = params["vertices"].detach(), params["texture"]
        found = Reach(self.renderer, vertices * self.settings.unit, move=self.settings.reach * self.settings.unit)
        if found.fullest > self.renderer.capacity and "tiles are full" not in self.facts:
            self.facts["tiles are full"] = True
            warnings.warn(
                f"{found.fullest} triangles meet in one tile of {TILE} x {TILE} pixels, which has room for {self.renderer.capacity}: the farthest are not "
                "drawn there. Lower lr, or use a larger image.",
                stacklevel=2,
            )
        height, width = texture.shape[:2]
        corner = torch.arange(len(vertices), device=texture.device)[:, None].expand_as(vertices)
        number = torch.arange(height * width, device=texture.device).view(height, width, 1).expand_as(texture)
        return {
            "vertices": Influence.pairs(corner, *found.of_vertices(), count=len(vertices), distinct=True),
            "texture": Influence.pairs(number, *found.of_texels(height, width), count=height * width),
        }

    def check_engine(self, engine: Engine) -> None:
        """Refuse noise that moves a vertex farther than the map says.

        Raises:
            SettingError: names the reach that suits the engine's sigma and law.
        """
        sigma, law, rank = (getattr(engine, name, None) for name in ("sigma", "noise", "rank"))
        if not self.settings.credit or not isinstance(sigma, (int, float)) or law not in LARGEST or rank is not None:
            return  # noise of low rank has no use for maps: the engine says so itself
        needed = sigma * LARGEST[law]
        if self.settings.reach < needed * (1 - 1e-9):
            raise SettingError(
                f"reach={self.settings.reach!r} is not allowed with {engine.name}'s sigma={sigma!r} and noise={law!r}: vertices move by up to {needed:.4g}. "
                f"Set the problem's reach to {needed:.4g} or more, lower sigma, or set credit=false."
            )

    def evaluate(self, predict: Any, *, split: str = "test") -> dict[str, float]:
        """{"psnr", "loss"} of the image against the target: decibels, and the mean square error."""
        with torch.no_grad():
            target = self.target.to(self.texture.device)[None]
            loss = float(self.score(predict(torch.zeros(1, dtype=torch.int64, device=target.device)), target).double().mean())
        return {"psnr": -10 * math.log10(max(loss, 1e-10)), "loss": loss}

    def pictures(self, params: Tree) -> Mapping[str, Tensor]:
        """The image, the target beside it, and the texture."""
        with torch.no_grad():
            image = self.forward(params, None, {})[0]
        return {"image": image, "target": self.target, "texture": params["texture"]}


@dataclass(frozen=True)
class Rasterizer:
    """Vertices and texture of a rendered scene, from a target image: hard edges, a z-buffer, no gradient, a loss and credit for each pixel.

    Defaults of the command line: engine spsa with sign noise (sigma 0.05, 1 pair), Adam, lr 2e-2, cosine schedule, batch 1 (the one image), 10 epochs of
    50 updates; 110,766 parameters. The image of every evaluation is written to the run folder.
    """

    image: int = field(default=192, metadata={"help": "pixels a side, a multiple of 16"})
    texture: int = field(default=192, metadata={"help": "texels a side; three parameters each"})
    cells: int = field(default=6, metadata={"help": "squares a side of the background's grid, two triangles each"})
    lookup: str = field(default="nearest", metadata={"help": "what a pixel reads of the texture: the nearest texel, or four of them (bilinear)"})
    jitter: float = field(default=4.0, metadata={"help": "pixels: at the start every vertex is off by up to this, in x and in y"})
    unit: float = field(default=2.0, metadata={"help": "pixels in one unit of the parameter `vertices`, so that one sigma and one lr suit colours, too"})
    reach: float = field(default=0.05, metadata={"help": "largest move of a vertex that credit counts on, in its unit; with sign noise sigma or more"})
    credit: bool = field(default=True, metadata={"help": "say which pixels a parameter can reach; false: each is credited with all of them"})

    name: ClassVar[str] = "rasterizer"
    batch_size: ClassVar[int] = 1
    defaults: ClassVar[Mapping[str, Any]] = {
        "engine": "spsa",
        "engine_settings": {"noise": "sign", "sigma": 0.05},
        "optimizer": "Adam",
        "lr": 2e-2,
        "schedule": "cosine",
        "epochs": 10,
    }

    def __post_init__(self) -> None:
        require(isinstance(self.image, int) and self.image >= TILE and self.image % TILE == 0, "image", self.image, f"a multiple of {TILE}")
        for label, least in (("texture", 4), ("cells", 1)):
            value = getattr(self, label)
            require(isinstance(value, int) and value >= least, label, value, f"a whole number of at least {least}")
        if self.lookup not in LOOKUPS:
            raise SettingError(near_miss("lookup", str(self.lookup), LOOKUPS))
        require(0 <= self.jitter < float("inf"), "jitter", self.jitter, "a number of at least 0")
        for label in ("unit", "reach"):
            value = getattr(self, label)
            require(0 < value < float("inf"), label, value, "a number above 0")
        require(isinstance(self.credit, bool), "credit", self.credit, "true or false")

    def build(self, key: Key, *, data_dir: str | Path | None = None) -> RasterizerProblem:
        """The problem; `key` addresses where the vertices start. There are no data to find."""
        return RasterizerProblem(self, key)
