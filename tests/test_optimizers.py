"""Optimizers by name, the reasons for refusals, and their state without pickle."""

import sys
import types

import pytest
import torch

from altgrad import checkpoint, optimizer_state, optimizers
from altgrad.errors import AltgradError, SettingError, UsageError


def params(dtype=torch.float32):
    return {"w": torch.arange(6.0).reshape(3, 2).to(dtype).requires_grad_(), "b": torch.ones(2, dtype=dtype, requires_grad=True)}


class Fake(torch.optim.Optimizer):
    """Keeps float32 moments whatever the parameter's dtype, and odd kinds of state."""

    def __init__(self, params, lr=0.1, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "dtype": torch.float32, "pair": (1, 2.5)})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("m", torch.zeros_like(p, dtype=torch.float32))
                state["m"] = group["beta"] * state["m"] + p.grad.float() / 3
                state["history"] = [*state.get("history", []), (state["m"].sum(), None)][-2:]
                p.sub_((group["lr"] * state["m"]).to(p.dtype))


@pytest.fixture
def extra(monkeypatch):
    """A stand-in for the package pytorch_optimizer."""

    class AdaHessian(Fake):
        pass

    class SAM(Fake):
        def __init__(self, params, base_optimizer, rho=0.05):
            super().__init__(params)

    class Lookahead(Fake):
        def __init__(self, optimizer, k=5):
            super().__init__([])

    class Ranger21(Fake):
        def __init__(self, params, num_iterations, lr=1e-3):
            super().__init__(params, lr)

    class NorMuon(Fake):
        def __init__(self, params, lr=1e-3):
            assert all("use_muon" in group for group in params)
            super().__init__(params, lr)

    class Adam(Fake):
        pass

    module = types.ModuleType("pytorch_optimizer")
    for cls in (AdaHessian, SAM, Lookahead, Ranger21, NorMuon, Adam):
        setattr(module, cls.__name__, cls)
    module.Lion = Fake
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", module)
    return module


@pytest.fixture
def no_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)


@pytest.mark.parametrize("name", ["Adam", "adam", "ADAM", "lbfgs", "RMSprop", "rms-prop"])
def test_torch_optimizers_are_found_in_any_spelling(no_extra, name):
    assert optimizers.find(name).__module__.startswith("torch.optim")


def test_the_other_package_is_asked_second(extra):
    assert optimizers.find("lion") is extra.Lion
    assert optimizers.find("adam") is torch.optim.Adam


def test_an_unknown_name_gets_the_nearest_and_the_extra(no_extra):
    with pytest.raises(UsageError, match=r"unknown optimizer 'Adem'\. Did you mean 'Adam'\?.*altgrad\[optim\]") as caught:
        optimizers.find("Adem")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("AdaHessian", "differentiates the gradient again through the autograd graph"),
        ("sophia-h", "differentiates the gradient again through the autograd graph"),
        ("LOMO", "inside the backward pass of the model"),
        ("SparseAdam", "sparse gradients only"),
        ("SAM", "wants base_optimizer, which a name cannot carry"),
        ("Lookahead", "wants optimizer, which a name cannot carry"),
    ],
)
def test_what_no_given_gradient_can_feed_is_refused_with_the_reason(extra, name, reason):
    with pytest.raises(UsageError, match=reason):
        optimizers.find(name)
    assert optimizers.plain(name) not in {optimizers.plain(known) for known in optimizers.names()}


def test_a_graph_optimizer_is_refused_even_where_its_package_is_missing(no_extra):
    with pytest.raises(UsageError, match="autograd graph"):
        optimizers.find("AdaHessian")


def test_settings_are_parsed_and_reach_the_optimizer():
    made = optimizers.build("AdamW", params(), lr=0.5, settings={"betas": "(0.5, 0.75)", "weight-decay": "1e-3", "amsgrad": "true"})
    group = made.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["amsgrad"]) == (0.5, (0.5, 0.75), 1e-3, True)


def test_an_unknown_setting_gets_the_nearest():
    with pytest.raises(SettingError, match=r"optimizer SGD: unknown setting 'momentun'\. Did you mean 'momentum'\?"):
        optimizers.build("SGD", params(), settings={"momentun": 0.9})


def test_a_missing_setting_is_named(extra):
    with pytest.raises(SettingError, match="Ranger21 has no default for num_iterations"):
        optimizers.build("Ranger21", params())


def test_a_value_the_optimizer_refuses_is_a_setting_error():
    with pytest.raises(SettingError, match=r"optimizer Adam refuses betas=\(2, 0.9\).*Invalid beta"):
        optimizers.build("Adam", params(), settings={"betas": (2, 0.9)})


def test_a_negative_rate_is_refused():
    with pytest.raises(SettingError, match="lr=-1 is not allowed; it must be 0 or more"):
        optimizers.build("Adam", params(), lr=-1)


def test_the_muon_family_gets_matrices_and_the_rest_apart(extra):
    groups = optimizers.build("NorMuon", params()).param_groups
    assert [(group["use_muon"], [tuple(p.shape) for p in group["params"]]) for group in groups] == [(True, [(3, 2)]), (False, [(2,)])]


def test_only_optimizers_that_evaluate_the_loss_want_a_closure():
    wanting = {name for name in optimizers.names() if name != "Muon" and optimizers.wants_closure(optimizers.build(name, params()))}
    assert wanting == {"LBFGS"}


# State.


def run(optimizer, tensors, steps, first=0):
    for index in range(first, first + steps):
        generator = torch.Generator().manual_seed(index)
        gradients = {name: torch.randn(p.shape, generator=generator).to(p.dtype) for name, p in tensors.items()}

        def closure(gradients=gradients):
            for name, p in tensors.items():
                p.grad = (gradients[name] * 0.1 + p.detach()).to(p.dtype)
            return sum(p.detach().float().square().sum() for p in tensors.values())

        closure()
        optimizer.step(closure)


TORCH = [name for name in optimizers.names() if getattr(torch.optim, name, None) is not None and name != "Muon"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TORCH)
def test_an_optimizer_stored_without_pickle_goes_on_bit_for_bit(tmp_path, name, dtype):
    settings = {"momentum": 0.9} if name == "SGD" else {"history_size": 3, "max_iter": 4} if name == "LBFGS" else {}
    whole = params(dtype)
    optimizer = optimizers.build(name, whole, lr=20.0 if name == "Adadelta" else 0.05, settings=settings)
    run(optimizer, whole, 3)
    tensors, skeleton = optimizer_state.pack(optimizer.state_dict(), prefix="optimizer/")
    path = checkpoint.save(tmp_path, step=3, tensors=tensors, meta={"optimizer": skeleton})
    copy = {key: tensor.detach().clone().requires_grad_() for key, tensor in whole.items()}
    run(optimizer, whole, 3, first=3)

    again = optimizers.build(name, copy, lr=0.9, settings=settings)
    loaded = checkpoint.load(path)
    optimizer_state.restore(again, optimizer_state.unpack(loaded.tensors, loaded.meta["optimizer"]))
    run(again, copy, 3, first=3)
    assert all(torch.equal(whole[key], copy[key]) for key in whole)
    assert not any(torch.equal(whole[key], value) for key, value in params(dtype).items())


def test_wider_moments_than_the_parameters_are_restored_unrounded(tmp_path):
    whole = params(torch.bfloat16)
    optimizer = Fake(list(whole.values()))
    run(optimizer, whole, 2)
    tensors, skeleton = optimizer_state.pack(optimizer.state_dict())
    again = Fake([p.detach().clone().requires_grad_() for p in whole.values()])
    optimizer_state.restore(again, optimizer_state.unpack(tensors, skeleton))
    for old, new in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert new["m"].dtype == torch.float32
        assert torch.equal(old["m"], new["m"])
    assert again.param_groups[0]["dtype"] is torch.float32
    assert again.param_groups[0]["pair"] == (1, 2.5)


def test_a_restored_optimizer_shares_no_memory_with_what_it_was_restored_from():
    whole = params()
    optimizer = optimizers.build("Adam", whole)
    run(optimizer, whole, 1)
    tensors, skeleton = optimizer_state.pack(optimizer.state_dict())
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    again = optimizers.build("Adam", params())
    optimizer_state.restore(again, optimizer_state.unpack(tensors, skeleton))
    for state in again.state.values():
        state["exp_avg"].add_(1)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors.items())


def test_nests_of_every_kind_come_back_as_they_were():
    value = {0: [1, 2.5, (None, True, "x")], "a": {"b": torch.float16, (1, 2): []}, "t": (torch.ones(2), [torch.zeros(())])}
    tensors, skeleton = optimizer_state.pack(value)
    again = optimizer_state.unpack(tensors, skeleton)
    assert list(again) == [0, "a", "t"]
    assert again[0] == value[0]
    assert type(again[0][2]) is tuple
    assert again["a"] == value["a"]
    assert torch.equal(again["t"][0], torch.ones(2))


def test_two_names_that_read_alike_do_not_share_a_tensor():
    value = {"a": {"b": torch.zeros(1)}, "a.b": torch.ones(1), 1: torch.ones(1) * 2, "1": torch.ones(1) * 3}
    tensors, skeleton = optimizer_state.pack(value)
    again = optimizer_state.unpack(tensors, skeleton)
    assert [again["a"]["b"].item(), again["a.b"].item(), again[1].item(), again["1"].item()] == [0, 1, 2, 3]


def test_state_that_only_a_pickle_could_hold_is_refused():
    with pytest.raises(AltgradError, match=r"state\.hook is a function, which cannot be stored without pickle"):
        optimizer_state.pack({"state": {"hook": lambda: None}})
