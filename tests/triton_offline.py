"""Every Triton kernel through the compiler for a GPU that is not here: `python triton_offline.py`; prints one line a kernel.

The interpreter forgives what the compiler does not (branches of different types, shapes that are no power of two).
"""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from altgrad.kernels import _cuda, launch

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
TARGETS = [GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32)]
ADDRESS = (-5, 2**32 - 1, 7)


class Offline:
    """A kernel whose launch is its compilation, for the types and constants the launch has."""

    def __init__(self, kernel):
        self.kernel, self.compiled = kernel, set()

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **named):
        options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
        given = dict(zip(self.kernel.arg_names, args, strict=False)) | named
        signature, constants = {}, {}
        for parameter in self.kernel.params:
            value = given.pop(parameter.name)
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and parameter.name not in _cuda.SEEDS):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32" if -(2**31) <= value < 2**31 else "i64"
        assert not given, given
        seen = (str(signature), str(constants))
        if seen not in self.compiled:
            self.compiled.add(seen)
            # What a type or a constant breaks, it breaks before the target is known: the older one sees each kernel once.
            for target in TARGETS if len(self.compiled) == 1 else TARGETS[1:]:
                triton.compile(ASTSource(self.kernel, signature, constants), target=target, options=options)
            print(self.kernel.__name__, constants, flush=True)


def main():
    for name in [name for name in vars(_cuda) if name.endswith("_kernel")]:
        setattr(_cuda, name, Offline(getattr(_cuda, name)))
    ids, half = torch.arange(4), torch.bfloat16
    x, weight, bias = torch.empty(4, 2, 256, dtype=half), torch.empty(128, 256, dtype=half), torch.empty(128, dtype=half)
    a, b = torch.empty(4, 128, 1, dtype=half), torch.empty(4, 256, 1, dtype=half)
    launch.addressed_fill_(torch.empty(4, 1000), ids, *ADDRESS, "normal", 0)
    launch.addressed_fill_(torch.empty(4, 1000, dtype=torch.int64), ids, *ADDRESS, "integers", 3)
    launch.addressed_axpy_(torch.empty(1000, dtype=half), torch.ones(1), ids[:1], *ADDRESS, "sign", None)
    for launch.PRODUCT in ("library", "fused"):
        launch.population_linear(x, weight, bias, a, b, 0.1, False, False)
        launch.addressed_linear(x[:, :1], weight, None, ids, *ADDRESS, "normal", 1, 0.1, False, False)
        launch.addressed_linear(x, weight, bias, ids[:2], *ADDRESS, "sign", 4, 0.1, False, True)
    launch.addressed_linear(x[0], weight, bias, ids[:1], *ADDRESS, "uniform", 3, 0.1, True, True)
    launch.lowrank_update(torch.ones(4), a, b)
    launch.addressed_update(torch.ones(4), ids, *ADDRESS, "normal", 1, 128, 256, None, torch.float32)
    launch.addressed_update(torch.ones(1), ids[:1], *ADDRESS, "sign", 4, 128, 256, None, half)


if __name__ == "__main__":
    main()
