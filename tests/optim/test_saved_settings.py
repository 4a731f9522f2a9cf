"""What travels with a state, what a loaded state may change, and that a load that fails changes nothing."""

from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lion_cases import DEVICE, same_bits, same_state
from reference import lion_float32

import megatron_lion.optim.lion
from megatron_lion.optim.lion import Lion

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
HYPER = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}


def build(groups=1, dtype=torch.float32, **settings):
    """Returns an optimizer after one step on two parameters, in one group or two."""
    params = [torch.nn.Parameter(torch.linspace(-1, 2, size, device=DEVICE).to(dtype)) for size in (70, 33)]
    optimizer = Lion([{"params": params}] if groups == 1 else [{"params": [p]} for p in params], **HYPER, **settings)
    for param in params:
        param.decoupled_grad = torch.linspace(-2, 1, len(param), device=DEVICE)
    optimizer.step()
    return optimizer, params


# ---- settings travel


@pytest.mark.parametrize(
    ("name", "value"), [("cautious", True), ("init_exp_avg", "first_gradient"), ("maximize", True)]
)
def test_a_state_with_another_setting_is_refused_either_way(name, value):
    with_it, _ = build(**{name: value})
    without, _ = build()
    for saved, other in ((with_it, without), (without, with_it)):
        state = saved.state_dict()
        assert name in state["param_groups"][0]
        with pytest.raises(ValueError, match=rf"^{name} = .* in the state, .* in this optimizer: build Lion\("):
            other.load_state_dict(state)
        saved.load_state_dict(state)
        # The way that the message names, and a state of a version that did not save it.
        state["param_groups"][0][name] = other.param_groups[0][name]
        other.load_state_dict(state)
        del state["param_groups"][0][name]
        other.load_state_dict(state)
        assert other.param_groups[0][name] == other.defaults[name]


def test_settings_of_the_whole_optimizer_may_not_differ_between_groups():
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    with pytest.raises(ValueError, match=r"cautious = True in a group of Lion.*one value for all"):
        Lion([{"params": params[:1]}, {"params": params[1:], "cautious": True}])
    optimizer = Lion(params)
    optimizer.param_groups[0]["init_exp_avg"] = "first_gradient"
    params[0].grad = torch.ones(2)
    with pytest.raises(ValueError, match="init_exp_avg = 'first_gradient' in a group"):
        optimizer.step()


def test_groups_that_software_replaced_by_its_own_keep_the_settings():
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = Lion([param], lr=0.5, maximize=True)
    optimizer.param_groups = [{"params": [param], "lr": 0.5, "betas": (0.9, 0.99), "weight_decay": 0.0}]
    param.grad = torch.ones(2)
    optimizer.step()
    assert param.tolist() == [0.5, 0.5]
    assert optimizer.state_dict()["param_groups"][0]["maximize"] is True


def test_a_pickle_of_an_older_version_gets_the_settings():
    optimizer, _ = build(cautious=True)
    for group in (*optimizer.param_groups, optimizer.defaults):
        for name in ("cautious", "init_exp_avg", "maximize"):
            del group[name]
    again = copy.deepcopy(optimizer)  # which pickles it
    assert {name: again.param_groups[0][name] for name in ("cautious", "maximize")} == {
        "cautious": True,
        "maximize": False,
    }


# ---- states of others


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"maximize": True}, "maximize = True in the state"),
        ({"caution": True}, r"caution = True, timm's name.*Lion\(cautious=True\)"),
        ({"corrected_weight_decay": True}, "corrected_weight_decay = True.*needs False"),
        ({"decoupled_weight_decay": True}, "decoupled_weight_decay = True.*needs False"),
        ({"weight_decouple": False}, "weight_decouple = False.*needs True"),
        ({"fixed_decay": True}, "fixed_decay = True"),
        ({"adanorm": True, "r": 0.95}, "has r, which LION does not have"),
        ({"adanorm": True}, "adanorm = True"),
        ({"use_gc": True}, "use_gc = True"),
        ({"percentile_clipping": 5}, "has percentile_clipping, which LION does not have: delete it"),
        ({"lr": float("nan")}, "lr = nan"),
    ],
    ids=str,
)
def test_options_of_others_that_would_change_the_step_are_refused(keys, message):
    optimizer, _ = build()
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0].update(keys)
    before = copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert same_state(optimizer, before)
    assert optimizer.state_dict()["param_groups"] == before.state_dict()["param_groups"]
    if not {"lr", "r", "percentile_clipping"} & keys.keys() and keys != {"maximize": True}:
        with pytest.raises(ValueError, match=message):
            Lion([{"params": [torch.nn.Parameter(torch.zeros(1))], **keys}])


TIMM = {"caution": False, "corrected_weight_decay": False, "maximize": False, "foreach": None, "lr_scale": 0.5}
PYTORCH_OPTIMIZER = {"weight_decouple": True, "fixed_decay": False, "adanorm": False, "maximize": False, "step": 7}
SCHEDULED = {"initial_lr": 0.1, "max_lr": 0.2, "min_lr": 0.0, "swa_lr": 0.1, "max_momentum": 0.9, "base_momentum": 0.8}
TORCH = {
    "foreach": True,
    "fused": None,
    "capturable": False,
    "differentiable": False,
    "name": "all",
    "param_names": ["a", "b"],
}


@pytest.mark.parametrize("keys", [{}, TIMM, PYTORCH_OPTIMIZER, SCHEDULED, TORCH], ids=len)
def test_a_state_of_another_lion_goes_on(keys):
    """By hand from numpy: the groups' keys as these packages save them, and nothing but exp_avg in the state."""
    optimizer, params = build()
    rng = np.random.default_rng(3)
    momenta = [rng.standard_normal(len(param)).astype(np.float32) for param in params]
    state = {number: {"exp_avg": torch.from_numpy(momentum)} for number, momentum in enumerate(momenta)}
    group = {"lr": 0.03, "betas": (0.8, 0.9), "weight_decay": 0.2, **keys, "params": [0, 1]}
    optimizer.load_state_dict({"state": state, "param_groups": [group]})
    expected = []
    for param, momentum in zip(params, momenta, strict=True):
        start, grad = param.detach().cpu().numpy(), rng.standard_normal(len(param)).astype(np.float32)
        param.decoupled_grad = torch.from_numpy(grad).to(DEVICE)
        expected.append(lion_float32(start.copy(), momentum, grad, lr=0.03, betas=(0.8, 0.9), weight_decay=0.2))
    optimizer.step()
    for param, (theta, exp_avg) in zip(params, expected, strict=True):
        assert same_bits(param.detach().cpu(), torch.from_numpy(theta))
        assert same_bits(optimizer.state[param]["exp_avg"].cpu(), torch.from_numpy(exp_avg))


def test_the_state_of_lion_pytorch_goes_on_but_for_rounding():
    """It computes θ(1 - ηλ) - ηs, this one θ - η(s + λθ)."""
    module = pytest.importorskip("lion_pytorch", reason="needs lion_pytorch (the dev extra has it)")
    generator = torch.Generator().manual_seed(1)
    theirs, ours = (torch.nn.Parameter(torch.linspace(-1, 2, 70)) for _ in range(2))
    other, optimizer = module.Lion([theirs], **HYPER), Lion([ours], lr=9.0)
    for step in range(6):
        theirs.grad = torch.randn(70, generator=generator)
        if step == 3:
            optimizer.load_state_dict(other.state_dict())
            with torch.no_grad():
                ours.copy_(theirs)
        ours.grad = theirs.grad.clone()
        other.step()
        if step >= 3:
            optimizer.step()
    assert (ours - theirs).abs().max() < 2e-6
    assert (optimizer.state[ours]["exp_avg"] - other.state[theirs]["exp_avg"]).abs().max() < 1e-6


def test_timms_caution_is_ours():
    cautious, _ = build(cautious=True)
    state = cautious.state_dict()
    group = state["param_groups"][0]
    del group["cautious"]
    cautious.load_state_dict({**state, "param_groups": [{**group, "caution": True}]})
    with pytest.raises(ValueError, match=r"caution = False.*Lion\(cautious=False\)"):
        cautious.load_state_dict({**state, "param_groups": [{**group, "caution": False}]})


@pytest.mark.parametrize("kind", ["SGD", "SGD momentum", "AdamW", "Adagrad", "RMSprop", "new AdamW"])
def test_states_of_other_optimizers_are_refused_on_loading(kind):
    optimizer, params = build()
    theirs = [torch.nn.Parameter(param.detach().clone()) for param in params]
    name = kind.split(" ")[-1] if kind == "new AdamW" else kind.split(" ")[0]
    other = getattr(torch.optim, name)(theirs, lr=0.1, **({"momentum": 0.9} if "momentum" in kind else {}))
    if kind != "new AdamW":
        for param in theirs:
            param.grad = torch.ones_like(param)
        other.step()
    before = copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match=r"needs a state of LION|needs the state of a LION|which LION does not have"):
        optimizer.load_state_dict(other.state_dict())
    assert same_state(optimizer, before)
    optimizer.step()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("exp_avg", None, "exp_avg of parameter 0 is NoneType"),
        ("exp_avg", torch.zeros(70, dtype=torch.int16), "is torch.int16: needs a tensor that a LION saved"),
        ("master_param", torch.zeros(70, dtype=torch.uint8), "is torch.uint8"),
        ("exp_avg", torch.zeros(69), "69 elements"),
        ("exp_avg", torch.zeros(7, dtype=torch.uint8), "7 elements, torch.uint8"),
    ],
    ids=range(5),
)
@pytest.mark.parametrize("mode", [{}, {"master_weights": "split32", "momentum": "int8"}], ids=len)
def test_a_state_of_another_form_is_refused_on_loading(name, value, message, mode):
    optimizer, _ = build(dtype=torch.bfloat16, **mode)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0][name] = value
    before = copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert same_state(optimizer, before)


def test_state_of_parameters_that_no_group_lists_is_refused():
    """By names instead of numbers, every entry would be ignored, and the momentum would begin again at 0."""
    optimizer, _ = build()
    state = optimizer.state_dict()
    state["state"] = {f"layer.{number}": value for number, value in state["state"].items()}
    with pytest.raises(ValueError, match=r"state of layer\.0, layer\.1, which is in no group"):
        optimizer.load_state_dict(state)


def test_a_count_of_steps_may_be_a_number():
    optimizer, params = build(count_steps=True)
    state = copy.deepcopy(optimizer.state_dict())
    for number, value in enumerate((7, 7.0)):
        state["state"][number]["step"] = value
    optimizer.load_state_dict(state)
    optimizer.step()
    assert [float(optimizer.state[param]["step"]) for param in params] == [8.0, 8.0]


# ---- packed states


@pytest.mark.parametrize("momentum", ["int8", "bf16"])
@pytest.mark.parametrize("master", ["none", "fp32", "split32", "split24"])
def test_a_packed_state_is_converted_when_a_plain_lion_loads_it(momentum, master):
    packed, params = build(dtype=torch.bfloat16, momentum=momentum, master_weights=master)
    plain, others = build(dtype=torch.bfloat16)
    plain.load_state_dict(copy.deepcopy(packed.state_dict()))
    for param, other in zip(params, others, strict=True):
        assert set(plain.state[other]) == {"exp_avg"}
        assert same_bits(plain.state[other]["exp_avg"], packed.get_unscaled_state(param, "exp_avg"))
    plain.step()


def test_a_packed_state_is_refused_for_shards(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    packed, _ = build(momentum="int8")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        params = [torch.nn.Parameter(distribute_tensor(torch.zeros(size), mesh, [Shard(0)])) for size in (70, 33)]
        sharded = Lion(params)
        with pytest.raises(ValueError, match=r"packed int8 momentum for a DTensor.*unscaled_state_dict\(\)"):
            sharded.load_state_dict(packed.state_dict())
        assert not sharded.state
    finally:
        torch.distributed.destroy_process_group()


def test_without_the_other_files_a_packed_state_is_refused_on_loading(tmp_path, monkeypatch):
    """lion.py and update.py alone, as they may be copied into another project."""
    (tmp_path / "copied_lion").mkdir()
    for name in ("lion.py", "update.py"):
        shutil.copyfile(Path(megatron_lion.optim.lion.__file__).with_name(name), tmp_path / "copied_lion" / name)
    monkeypatch.syspath_prepend(tmp_path)
    from copied_lion.lion import Lion as Alone

    param = torch.nn.Parameter(torch.ones(40))
    alone = Alone([param], **HYPER)
    packed = Lion([torch.nn.Parameter(torch.ones(40))], momentum="int8", **HYPER)
    packed.init_state()
    with pytest.raises(ValueError, match=r"exp_avg is packed, torch.uint8: needs .*unscaled_state_dict\(\)"):
        alone.load_state_dict(packed.state_dict())
    assert not alone.state
    alone.load_state_dict(packed.unscaled_state_dict())
    for name in [name for name in sys.modules if name.startswith("copied_lion")]:
        del sys.modules[name]


# ---- a load that fails


@pytest.mark.parametrize("master", ["none", "fp32", "split32"])
@pytest.mark.parametrize("fault", ["second state", "number of groups", "hook before", "hook after", "interrupt"])
def test_a_load_that_fails_leaves_everything_as_it_was(fault, master):
    dtype = torch.float32 if master == "none" else torch.bfloat16
    saved, _ = build(2, dtype, master_weights=master, count_steps=True)
    saved.step()
    state = copy.deepcopy(saved.state_dict())
    for group in state["param_groups"]:
        group.update(lr=0.5, betas=(0.5, 0.5), weight_decay=0.0)
    optimizer, params = build(2, dtype, master_weights=master, count_steps=True)
    groups, tensors = optimizer.param_groups, [optimizer.state[param]["exp_avg"] for param in params]
    before, weights = copy.deepcopy(optimizer), [param.detach().clone() for param in params]

    def fail(*_):
        raise KeyboardInterrupt if fault == "interrupt" else ValueError("not this one")

    if fault == "second state":
        state["state"][1]["exp_avg"] = torch.zeros(3)
    elif fault == "number of groups":
        state["param_groups"].pop()
        del state["state"][1]
    elif fault == "hook before":
        optimizer.register_load_state_dict_pre_hook(fail)
    else:
        optimizer.register_load_state_dict_post_hook(fail)
    given = copy.deepcopy(state)
    with pytest.raises((ValueError, KeyboardInterrupt)):
        optimizer.load_state_dict(state)
    assert same_state(optimizer, before)
    assert optimizer.state_dict()["param_groups"] == before.state_dict()["param_groups"]
    assert optimizer.param_groups is groups, "software that holds the groups still holds the right ones"
    assert all(optimizer.state[param]["exp_avg"] is tensor for param, tensor in zip(params, tensors, strict=True))
    assert all(same_bits(param.detach(), weight) for param, weight in zip(params, weights, strict=True))
    assert state.keys() == given.keys()
    assert state["state"].keys() == given["state"].keys(), "the caller's dict is not changed"
    assert state["param_groups"] == given["param_groups"]
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == (fault == "hook before")
    optimizer.step()
