"""A parameter that changes its dtype, size or device after a step: every implementation refuses the old state alike."""

from __future__ import annotations

import pytest
import torch
from lion_cases import DEVICE, IMPLEMENTATIONS, same_bits

from megatron_lion.optim.lion import Lion

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
# (settings of Lion, dtype before, dtype after)
MISFITS = {
    "float64 to float32": ({}, DOUBLE, SINGLE),
    "float32 to float64": ({}, SINGLE, DOUBLE),
    "split32, float32 to bfloat16": ({"master_weights": "split32"}, SINGLE, HALF),
    "split32, bfloat16 to float32": ({"master_weights": "split32"}, HALF, SINGLE),
    "split24, bfloat16 to float16": ({"master_weights": "split24"}, HALF, torch.float16),
}
FITS = {
    "float32 to bfloat16": ({}, SINGLE, HALF),
    "bfloat16 to float32": ({}, HALF, SINGLE),
    "fp32 masters, float32 to bfloat16": ({"master_weights": "fp32"}, SINGLE, HALF),
    "fp32 masters, bfloat16 to float16": ({"master_weights": "fp32"}, HALF, torch.float16),
    "int8, bfloat16 to float32": ({"momentum": "int8"}, HALF, SINGLE),
}


def stepped(implementation, dtype, settings, size=70):
    """An optimizer of two groups after one step; the parameter that will change is the second of the second group."""
    params = [torch.nn.Parameter(torch.linspace(-2, 2, size, device=DEVICE).to(dtype)) for _ in range(3)]
    optimizer = Lion(
        [{"params": params[:1]}, {"params": params[1:]}], lr=0.1, implementation=implementation, **settings
    )
    for param in params:
        param.grad = torch.cos(param.detach().float()).to(dtype)
    optimizer.step()
    return optimizer, params


def change(param, data):
    param.grad = None
    param.data = data
    param.grad = torch.sin(torch.arange(data.numel(), device=data.device)).to(data.dtype).view(data.shape)


def everything(optimizer, params):
    return [param.detach().clone() for param in params] + [
        tensor.clone() for param in params for tensor in optimizer.state[param].values()
    ]


def refuses(optimizer, params, words):
    """The step fails with a message that names the parameter, and changes nothing."""
    before = everything(optimizer, params)
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            optimizer.step()
    after = everything(optimizer, params)
    assert all(same_bits(old, new) for old, new in zip(before, after, strict=True))


def choices(settings, *dtypes):
    return [name for name in IMPLEMENTATIONS if not (name == "triton" and DOUBLE in dtypes)]


@pytest.mark.parametrize("case", MISFITS)
def test_a_state_of_another_dtype_is_refused_by_every_implementation(case):
    settings, before, after = MISFITS[case]
    for implementation in choices(settings, before, after):
        optimizer, params = stepped(implementation, before, settings)
        change(params[2], params[2].detach().to(after))
        words = "parameter of torch.float16" if after == torch.float16 else "parameter 1 in group 1 is torch"
        refuses(optimizer, params, words)


@pytest.mark.parametrize("case", FITS)
def test_a_state_that_suits_both_dtypes_goes_on_as_in_the_reference(case):
    settings, before, after = FITS[case]
    results = []
    for implementation in choices(settings, before, after):
        optimizer, params = stepped(implementation, before, settings)
        change(params[2], params[2].detach().to(after))
        optimizer.step()
        results.append(everything(optimizer, params))
    for result in results[1:]:
        assert all(same_bits(one, other) for one, other in zip(results[0], result, strict=True))


@pytest.mark.parametrize("size", [1, 7, 2000])
@pytest.mark.parametrize("settings", [{}, {"momentum": "int8"}, {"master_weights": "fp32"}], ids=str)
def test_a_parameter_of_another_size_is_refused_by_every_implementation(size, settings):
    for implementation in IMPLEMENTATIONS:
        optimizer, params = stepped(implementation, SINGLE, settings)
        change(params[2], torch.ones(size, device=DEVICE))
        refuses(optimizer, params, f"exp_avg of parameter 1 in group 1 is .*shape \\({size},\\)")


def test_a_shape_of_as_many_elements_is_refused_by_every_implementation():
    for implementation in IMPLEMENTATIONS:
        optimizer, params = stepped(implementation, SINGLE, {})
        change(params[2], params[2].detach().view(7, 10))
        refuses(optimizer, params, r"shape \(70,\).*shape \(7, 10\)")


def test_a_state_that_software_replaced_is_refused():
    for implementation in IMPLEMENTATIONS:
        optimizer, params = stepped(implementation, SINGLE, {})
        optimizer.state[params[2]]["exp_avg"] = optimizer.state[params[2]]["exp_avg"].to(HALF)
        refuses(optimizer, params, "exp_avg of parameter 1 in group 1 is torch.bfloat16")


def test_a_state_on_another_device_is_refused():
    optimizer, params = stepped("reference", SINGLE, {})
    optimizer.state[params[2]]["exp_avg"] = torch.empty(70, device="meta")
    with pytest.raises(ValueError, match="on meta, but the parameter is now"):
        optimizer.step()


@pytest.mark.parametrize("case", [name for name in MISFITS if "float16" not in name.split(" to ")])
def test_the_way_out_that_the_message_names(case):
    """float32 and bfloat16 values of the momentum are kept exactly; the step then equals that of the same state."""
    settings, before, after = MISFITS[case]
    optimizer, params = stepped("reference", before, settings)
    momentum = optimizer.get_unscaled_state(params[2], "exp_avg").clone()
    change(params[2], params[2].detach().to(after))
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(optimizer.get_unscaled_state(params[2], "exp_avg").float(), momentum.float())
    optimizer.step()
    del optimizer.state[params[2]]
    change(params[2], torch.ones(5, device=DEVICE).to(after))
    optimizer.step()
    assert optimizer.state[params[2]]["exp_avg"].shape == (5,)
