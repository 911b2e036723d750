"""Figure 8: a population's layer beside plain inference on a GPU, in bfloat16, noise made before and made in the kernel; and the update.

    python benchmarks/gpu_lowrank.py [--width 8192] [--members 1024] [--tokens 1 4 16] [--sweep] [--out benchmarks/records/gpu_lowrank.json]

Every figure is plain inference's time (F.linear, same rows) over the case's own: 1 is as fast. For updates it is the update's time over that
of the layer. Medians of --repeats runs between CUDA events, case and baseline in turn; "plain torch" are the same operators without Triton.
--sweep tries tiles for the fused kernel first. Errors are against float64, in units of plain torch's. Without a GPU it says so, records
"not run" and leaves with 0.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from recording import record

from altgrad.kernels import lowrank, operators
from altgrad.kernels.lowrank_plain import plain_linear, plain_update
from altgrad.rng import Key

KEY, NAME, SCALE = Key(0), 1, 0.01
ASKED = {"made": 0.90, "drawn": 0.70}
TILES = [
    {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
    for m, n, k, warps, stages in [(128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (128, 128, 64, 4, 4)]
]


def milliseconds(function: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def compare(base: Callable[[], object], case: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Median times of both in ms, and the median of base / case over rounds."""
    for _ in range(3):
        base(), case()
    rounds = [(milliseconds(base), milliseconds(case)) for _ in range(repeats)]
    return statistics.median(b for b, _ in rounds), statistics.median(c for _, c in rounds), statistics.median(b / c for b, c in rounds)


def layers(width: int, members: int, tokens: int, rank: int, law: str) -> tuple[Callable[[], torch.Tensor], dict[str, Callable[[], torch.Tensor]]]:
    """Plain inference, and the population's layer in every form; pairs share their factors."""
    cuda, half = torch.device("cuda"), range(members // 2)
    generator = torch.Generator(cuda).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=cuda).bfloat16()

    x, weight, bias = randn(members, tokens, width), randn(width, width) * width**-0.5, randn(width)
    a, b = lowrank.factors(law, KEY, tensor=NAME, members=half, rank=rank, shape=(width, width), dtype=torch.bfloat16, device=cuda)
    ids = operators.ids_of(half, cuda)
    address = (*operators.words_of(KEY), NAME, law, rank, SCALE, False, True)
    found = {
        "made": lambda: operators.OPS.population_linear(x, weight, bias, a, b, SCALE, False, True),
        "drawn": lambda: operators.OPS.addressed_linear(x, weight, bias, ids, *address),
        "plain torch": lambda: plain_linear(x, weight, bias, a, b, SCALE, False, True),
        "exact": lambda: plain_linear(x.double(), weight.double(), bias.double(), a.double(), b.double(), SCALE, False, True),
    }
    return lambda: F.linear(x, weight, bias), found


def updates(width: int, members: int, rank: int, law: str) -> dict[str, Callable[[], torch.Tensor]]:
    cuda, half = torch.device("cuda"), range(members // 2)
    a, b = lowrank.factors(law, KEY, tensor=NAME, members=half, rank=rank, shape=(width, width), dtype=torch.bfloat16, device=cuda)
    weights, ids = torch.randn(len(half), generator=torch.Generator(cuda).manual_seed(1), device=cuda), operators.ids_of(half, cuda)
    return {
        "made": lambda: operators.OPS.lowrank_update(weights, a, b),
        "drawn": lambda: operators.OPS.addressed_update(weights, ids, *operators.words_of(KEY), NAME, law, rank, width, width, None, torch.bfloat16),
        "plain torch": lambda: plain_update(weights, a, b),
    }


def sweep(width: int, members: int, repeats: int) -> list[dict]:
    """Times of the fused kernel by tile; leaves the quickest in place."""
    from altgrad.kernels import launch

    base, forms = layers(width, members, 1, 1, "normal")
    rows = []
    launch.PRODUCT = "fused"
    for tile in TILES:
        launch.FUSED_TILE = tile
        try:
            rows.append({"tile": tile, "ratio": compare(base, forms["drawn"], repeats)[2]})
        except Exception as error:  # a tile that does not fit this device's shared memory
            rows.append({"tile": tile, "error": str(error).splitlines()[0]})
        print(rows[-1], flush=True)
    launch.FUSED_TILE = max((row for row in rows if "ratio" in row), key=lambda row: row["ratio"])["tile"]
    return rows


def measure(arguments: argparse.Namespace) -> list[dict]:
    from altgrad.kernels import launch

    rows = []
    laws, ranks = ("normal", "sign"), (1, 4)
    for tokens, law, rank in itertools.product(arguments.tokens, laws, ranks):
        base, forms = layers(arguments.width, arguments.members, tokens, rank, law)
        exact = forms.pop("exact")() if tokens == 1 else None
        unit = None if exact is None else (forms["plain torch"]().double() - exact).square().mean().sqrt()
        for product, name in itertools.product(("library", "fused"), forms):
            if name == "plain torch" and product == "fused":
                continue
            launch.PRODUCT = product
            plain, own, ratio = compare(base, forms[name], arguments.repeats)
            error = None if exact is None else float((forms[name]().double() - exact).square().mean().sqrt() / unit)
            asked = ASKED.get(name) if (tokens, rank) == (1, 1) else None
            rows.append({"tokens": tokens, "law": law, "rank": rank, "case": name, "product": product, "inference_ms": plain, "ms": own}
                        | {"ratio": ratio, "error": error, "asked": asked})  # fmt: skip
            print(f"{tokens:3} tokens  {law:7} rank {rank}  {name:12} {product:8} {own:8.3f} ms  {ratio:6.3f}  error {error}", flush=True)
        launch.PRODUCT = "library"
        for name, form in updates(arguments.width, arguments.members, rank, law).items():
            update, _, ratio = compare(form, forms["drawn"], arguments.repeats)
            rows.append({"tokens": tokens, "law": law, "rank": rank, "case": f"update, {name}", "ms": update, "over_layer": ratio})
            print(f"{tokens:3} tokens  {law:7} rank {rank}  update, {name:12} {update:8.3f} ms  {ratio:6.3f} of the layer", flush=True)
        del base, forms, exact
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--members", type=int, default=1024)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("not run: torch finds no CUDA device on this machine")
        record(arguments.out, {"status": "not run", "reason": "torch finds no CUDA device", "asked": ASKED, "rows": []})
        return
    import triton

    device = {"name": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability(), "triton": triton.__version__}
    with torch.no_grad():
        tiles = sweep(arguments.width, arguments.members, arguments.repeats) if arguments.sweep else []
        rows = measure(arguments)
    settings = {"width": arguments.width, "members": arguments.members, "repeats": arguments.repeats, "dtype": "bfloat16"}
    record(arguments.out, {"status": "run", "device": device, **settings, "asked": ASKED, "tiles": tiles, "rows": rows})


if __name__ == "__main__":
    main()
