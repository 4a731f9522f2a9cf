"""What software expects of any torch optimizer, checked on `Lion`: the checks of torch's own optimizer tests, for LION's settings."""

from __future__ import annotations

import copy
import io
import itertools
import warnings

import pytest
import torch
from lion_cases import DEVICE, FAST, same_bits, same_state
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from megatron_lion.optim.lion import Lion

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
INPUTS = {
    "defaults": {},
    "rate tensor": {"lr": torch.tensor(0.01)},
    "rate of one element": {"lr": torch.tensor([0.01])},
    "decay": {"weight_decay": 0.9},
    "signum": {"betas": (0.8, 0.8)},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "cautious": {"cautious": True},
    "first gradient": {"init_exp_avg": "first_gradient", "count_steps": True},
    "packed": {"master_weights": "split32", "momentum": "int8", "betas": (0.9, 0.95)},
}
every_input = pytest.mark.parametrize("settings", INPUTS.values(), ids=INPUTS)
SHAPES = ((3, 4), (), (0,), (5,), (2, 1, 3))


def build(settings, shapes=SHAPES, groups=1, seed=0, **others):
    """Returns an optimizer over new parameters; a rate tensor is copied, so that optimizers do not share it."""
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for shape in shapes]
    own = [{"params": params[number::groups]} for number in range(groups)]
    settings = {"lr": 0.01, "implementation": "foreach", **copy.deepcopy(settings), **others}
    return Lion(own, **settings), params


def give_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param)


def train(optimizer, params, seeds):
    for seed in seeds:
        give_gradients(params, seed)
        optimizer.step()


@every_input
@pytest.mark.parametrize("implementation", FAST)
def test_the_fast_ways_match_the_loop_over_parameters(settings, implementation):
    (slow, ours), (fast, theirs) = (
        build(settings, implementation="reference"),
        build(settings, implementation=implementation),
    )
    train(slow, ours, range(3))
    train(fast, theirs, range(3))
    assert same_state(slow, fast)


@pytest.mark.parametrize("implementation", FAST)
def test_dtypes_may_be_mixed(implementation):
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    if implementation == "triton":
        dtypes.remove(torch.float64)
    ends = []
    for name in ("reference", implementation):
        params = [torch.nn.Parameter(torch.linspace(-1, 1, 7, device=DEVICE).to(dtype)) for dtype in dtypes * 2]
        optimizer = Lion(params, lr=0.1, weight_decay=0.1, implementation=name)
        train(optimizer, params, range(3))
        ends.append(optimizer)
    assert same_state(*ends)


@every_input
def test_it_goes_in_the_right_direction(settings):
    """Downhill on a distance, or uphill on its negative, with the weight decay off."""
    settings = {**settings, "weight_decay": 0.0}
    optimizer, (weight,) = build(settings, shapes=((4, 5),))
    target = torch.randn(4, 5, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    sign = -1 if settings.get("maximize") else 1
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = sign * (weight - target).abs().sum()
        loss.backward()
        losses.append(sign * float(loss.detach()))
        optimizer.step()
    assert losses[-1] < losses[0] - 2


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.5, 1.0, 3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, 2, cycle_momentum=False),
    "CyclicLR with betas": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.01, 6, cycle_momentum=False),
    "OneCycleLR with betas": lambda o: lr_scheduler.OneCycleLR(o, 0.01, 6),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.001),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("rate", ["number", "tensor"])
def test_every_scheduler_works_and_its_state_resumes(name, rate):
    settings = {"lr": 0.01 if rate == "number" else torch.tensor(0.01)}
    (whole, params), (first, early), (second, late) = (build(settings, groups=2) for _ in range(3))
    schedulers = [SCHEDULERS[name](optimizer) for optimizer in (whole, first, second)]
    rates, beta1s = set(), set()
    for step in range(4):
        rates.add(float(whole.param_groups[0]["lr"]))
        beta1s.add(whole.param_groups[0]["betas"][0])
        train(whole, params, [step])
        schedulers[0].step()
    assert len(rates) > 1
    assert (len(beta1s) > 1) == ("betas" in name), "cycle_momentum cycles β1"
    for step in range(2):
        train(first, early, [step])
        schedulers[1].step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    schedulers[2].load_state_dict(copy.deepcopy(schedulers[1].state_dict()))
    with torch.no_grad():
        for target, source in zip(late, early, strict=True):
            target.copy_(source)
    for step in range(2, 4):
        train(second, late, [step])
        schedulers[2].step()
    assert same_state(whole, second)


@every_input
def test_without_gradients_nothing_moves(settings):
    optimizer, params = build(settings)
    before = copy.deepcopy(params)
    optimizer.step()
    assert not optimizer.state
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(params, before, strict=True))
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
    assert list(optimizer.state) == params[:1]
    unmoved = "weight_decay" not in settings
    assert torch.equal(params[0], before[0]) == unmoved


@every_input
def test_a_closure_is_called_once_with_gradients_and_its_value_returned(settings):
    optimizer, (weight,) = build(settings, shapes=((3,),))
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        calls.append(1)
        return loss.detach()

    assert float(optimizer.step(closure)) > 0
    assert calls == [1]


@every_input
@pytest.mark.parametrize("how", ["load", "weights_only", "deepcopy", "json groups"])
def test_a_resumed_optimizer_goes_on_as_if_never_stopped(settings, how):
    optimizer, params = build(settings, groups=2)
    train(optimizer, params, range(3))
    if how == "deepcopy":
        again = copy.deepcopy(optimizer)
        others = [param for group in again.param_groups for param in group["params"]]
        others = [
            others[[id(p) for group in optimizer.param_groups for p in group["params"]].index(id(p))] for p in params
        ]
    else:
        again, others = build(settings, groups=2, seed=5, **({} if "lr" in settings else {"lr": 7.0}))
        state = optimizer.state_dict()
        if how == "weights_only":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        elif how == "json groups":  # where a tuple comes back as a list
            state = {
                **state,
                "param_groups": [{**group, "betas": list(group["betas"])} for group in state["param_groups"]],
            }
        with torch.no_grad():
            for target, source in zip(others, params, strict=True):
                target.copy_(source)
        again.load_state_dict(state)
    assert same_state(optimizer, again)
    train(optimizer, params, range(3, 6))
    train(again, others, range(3, 6))
    assert same_state(optimizer, again)


def test_a_copy_has_all_public_attributes():
    optimizer, _ = build({"cautious": True, "maximize": True, "count_steps": True})
    names = {name for name in vars(optimizer) if not name.startswith("_")}
    again = copy.deepcopy(optimizer)
    assert names == {name for name in vars(again) if not name.startswith("_")}
    assert {**again.defaults, "differentiable": False} == {**optimizer.defaults, "differentiable": False}
    assert repr(again) == repr(optimizer)
    assert all(word in repr(optimizer) for word in ("Lion", "maximize: True", "cautious: True"))


def test_hooks_run_in_order_around_every_step_and_state_dict():
    optimizer, params = build({})
    seen = []
    hooks = [
        optimizer.register_step_pre_hook(lambda *_: seen.append("before")),
        optimizer.register_step_post_hook(lambda *_: seen.append("after")),
        optimizer.register_state_dict_pre_hook(lambda _: seen.append("state before")),
        optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mine": 1}),
        optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append("load before") or dict(state)),
        optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("load first"), prepend=True),
        optimizer.register_load_state_dict_post_hook(lambda _: seen.append(len(optimizer.state))),
        optimizer.register_load_state_dict_post_hook(lambda _: seen.append("load last")),
    ]
    train(optimizer, params, [0])
    state = optimizer.state_dict()
    assert state["mine"] == 1
    optimizer.load_state_dict(state)
    assert seen == ["before", "after", "state before", "load first", "load before", len(params), "load last"]
    for hook in hooks:
        hook.remove()
    seen.clear()
    train(optimizer, params, [1])
    optimizer.load_state_dict(optimizer.state_dict())
    assert not seen


def test_hooks_of_all_optimizers_and_the_profiler_see_a_step():
    optimizer, params = build({})
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda own, *_: seen.append(own)),
        register_optimizer_step_post_hook(lambda own, *_: seen.append(own)),
    ]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(optimizer, params, [0])
    for handle in handles:
        handle.remove()
    assert seen == [optimizer, optimizer]
    assert any(event.key == "Optimizer.step#Lion.step" for event in profile.key_averages())


def test_named_parameters_keep_their_names_through_a_state():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)).to(DEVICE)
    named, unnamed = Lion(model.named_parameters()), Lion(copy.deepcopy(model).parameters())
    names = [name for name, _ in model.named_parameters()]
    assert named.state_dict()["param_groups"][0]["param_names"] == names
    train(named, list(model.parameters()), [0])
    unnamed.load_state_dict(named.state_dict())
    assert unnamed.param_groups[0]["param_names"] == names
    plain = Lion(copy.deepcopy(model).parameters())
    again = Lion(model.named_parameters())
    again.load_state_dict(plain.state_dict())
    assert again.param_groups[0]["param_names"] == names, "a state without names leaves the own ones"
    with pytest.raises(ValueError, match="with/without names"):
        named.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})


def test_a_hook_may_reorder_a_state_by_names():
    """torch's recipe for a model whose parameters were reordered."""
    pair = {"a": torch.full((2,), 1.0), "b": torch.full((2,), 2.0)}
    saved = Lion([(name, torch.nn.Parameter(value.clone())) for name, value in pair.items()])
    saved.init_state()
    for number, param in enumerate(saved.param_groups[0]["params"]):
        saved.state[param]["exp_avg"].fill_(number + 1)
    other = Lion([(name, torch.nn.Parameter(pair[name].clone())) for name in ("b", "a")])

    def by_name(optimizer, state):
        group = state["param_groups"][0]
        place = dict(zip(group["param_names"], group["params"], strict=True))
        names = optimizer.param_groups[0]["param_names"]
        return {**state, "param_groups": [{**group, "params": [place[name] for name in names], "param_names": names}]}

    other.register_load_state_dict_pre_hook(by_name)
    other.load_state_dict(saved.state_dict())
    assert [float(other.state[param]["exp_avg"][0]) for param in other.param_groups[0]["params"]] == [2.0, 1.0]


def test_a_state_of_other_groups_is_refused():
    one, _ = build({}, groups=1)
    two, _ = build({}, groups=2)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        one.load_state_dict(two.state_dict())
    fewer, _ = build({}, shapes=SHAPES[:2])
    with pytest.raises(ValueError, match="doesn't match the size"):
        one.load_state_dict(fewer.state_dict())


def test_groups_come_later_and_gradients_may_be_none_or_zero():
    optimizer, params = build({"maximize": True})
    train(optimizer, params, [0])
    late = torch.nn.Parameter(torch.zeros(3, device=DEVICE))
    optimizer.add_param_group({"params": late, "lr": 0.5, "maximize": False})
    assert optimizer.param_groups[1].keys() >= {"lr", "betas", "weight_decay", "maximize", "cautious", "init_exp_avg"}
    late.grad = torch.ones_like(late)
    optimizer.zero_grad(set_to_none=False)
    assert not late.grad.any()
    late.grad.fill_(1.0)
    optimizer.step()
    assert late.tolist() == [-0.5] * 3
    optimizer.zero_grad()
    assert late.grad is None


def test_what_torch_refuses_is_refused():
    weight = torch.nn.Parameter(torch.zeros(2))
    for params, error, message in (
        ([], ValueError, "empty parameter list"),
        ([{"params": {weight}}], TypeError, "ordered collections"),
        (weight, TypeError, "should be an iterable"),
        ([1.0], TypeError, "can only optimize Tensors"),
        ([weight * 2], ValueError, "non-leaf"),
        ([{"params": [weight]}, {"params": [weight]}], ValueError, "more than one parameter group"),
        ([torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))], ValueError, "complex64"),
        ([torch.zeros(2, dtype=torch.int64)], ValueError, "int64"),
    ):
        with pytest.raises(error, match=message):
            Lion(params)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Lion([weight, weight])
    assert "duplicate parameters" in str(caught[0].message)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(dtype):
    ends = []
    for default in (torch.float32, dtype):
        optimizer, params = build({"cautious": True, "count_steps": True, "weight_decay": 0.1})
        try:
            torch.set_default_dtype(default)
            for seed in range(2):
                generator = torch.Generator().manual_seed(seed)
                for param in params:
                    param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float32).to(DEVICE)
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        ends.append(optimizer)
    assert same_state(*ends)


def test_an_optimizer_per_parameter_in_the_backward_pass_is_the_same():
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))]
    models.append(copy.deepcopy(models[0]))
    whole = Lion(models[0].parameters(), lr=0.1)
    single = {param: Lion([param], lr=0.1) for param in models[1].parameters()}

    def update(param):
        single[param].step()
        single[param].zero_grad()

    for param in single:
        param.register_post_accumulate_grad_hook(update)
    for model, _ in itertools.product(models, range(3)):
        model(torch.linspace(-1, 1, 8).view(2, 4)).square().sum().backward()
        if model is models[0]:
            whole.step()
            whole.zero_grad()
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert same_bits(ours.detach(), theirs.detach())
