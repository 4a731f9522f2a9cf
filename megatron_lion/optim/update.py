"""LION's equations in plain torch, the plain form of its state, and the checks of tensors and settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Settings that determine a step and are saved with the state, in every group. "maximize" may differ between groups.
SAVED_SETTINGS = ("init_exp_avg", "cautious", "maximize")
# What a saved state may hold, and its dtypes; a number is a `step` of another version.
STATE_DTYPES: dict[str, set[torch.dtype]] = {
    "exp_avg": {*SUPPORTED_DTYPES, torch.uint8},
    "master_param": {*SUPPORTED_DTYPES, torch.int16, torch.int8},
    "step": set(),
}
# Options in the groups of other LIONs, with the values for which their step is this one's: timm's are the first, then
# lion-pytorch's (true: the decay is divided by the first rate), then pytorch_optimizer's.
FOREIGN_OPTIONS = {
    "corrected_weight_decay": False, "decoupled_weight_decay": False, "weight_decouple": True, "fixed_decay": False,
    "adanorm": False, "use_gc": False,
}  # fmt: skip
# Keys of a saved group that do not change a step: torch's own and its schedulers', timm's, and megatron-core's.
HARMLESS_KEYS = {
    "params", "param_names", "name", "lr", "betas", "weight_decay", "foreach", "fused", "capturable", "differentiable",
    "initial_lr", "max_lr", "min_lr", "swa_lr", "max_momentum", "base_momentum", "lr_scale", "step", "wd_mult", "lr_mult",
    "is_expert_parallel", "is_decoupled_lr", "default_config", "caution", *SAVED_SETTINGS, *FOREIGN_OPTIONS,
}  # fmt: skip
Forms = dict[str, tuple[torch.dtype, Sequence[int]]]  # dtype and shape of each state tensor, by name


class Slot(NamedTuple):
    """One parameter with all that its step needs; dense tensors on one device."""

    param: torch.Tensor
    grad: torch.Tensor
    state: dict[str, torch.Tensor]
    group: dict[str, Any]
    caution: torch.Tensor | None = None


class AdamWPair(NamedTuple):
    """LION's learning rate and weight decay that correspond to an AdamW pair."""

    lr: float
    weight_decay: float


def from_adamw(lr: float, weight_decay: float, ratio: float = 10.0) -> AdamWPair:
    """Suggests LION's learning rate and decay from a pair that was tuned for AdamW.

    A signed step has norm η√d, several times an AdamW step of the same η, so the rate is divided by `ratio`. The decay is
    multiplied by it, which keeps ηλ, the strength of the decay, unchanged.

    Args:
        lr: AdamW's learning rate.
        weight_decay: AdamW's decoupled weight decay.
        ratio: between 3 and 10 in practice; start with 10 and try 3 if training is slow.

    Returns:
        The pair (lr / ratio, weight_decay * ratio).

    Raises:
        ValueError: `ratio` is not a finite number above 0, or another argument is not one of at least 0.

    Example:
        >>> from_adamw(lr=1e-3, weight_decay=0.1, ratio=8)
        AdamWPair(lr=0.000125, weight_decay=0.8)

    Source: Chen et al., *Symbolic Discovery of Optimization Algorithms*, 2023, section 5.
    """
    check_rates({"lr": lr, "weight_decay": weight_decay})
    if not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(f"ratio = {ratio}: needs a finite number above 0, usually between 3 and 10")
    return AdamWPair(lr / ratio, weight_decay * ratio)


class PlainLayout:
    """The form of unpacked state: the parameter is its own master, and `exp_avg` has full precision."""

    is_plain = True
    master_weights = "none"
    momentum = "fp32"

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError if this layout cannot hold the group's state."""

    def new_state(self, param: torch.Tensor, start: float) -> dict[str, torch.Tensor]:
        """Returns the first state of a parameter; every momentum element is `start`."""
        return {"exp_avg": torch.full_like(param, start, dtype=compute_dtype(param), requires_grad=False)}

    def forms(self, param: torch.Tensor) -> Forms:
        """Returns the dtype and shape that each state tensor of a parameter must have."""
        return {"exp_avg": (compute_dtype(param), param.shape)}

    def fit(self, param: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        """Gives state the memory order of its parameter: a model may change to channels_last between two steps."""
        for name, value in state.items():
            if value.shape == param.shape and strides_of(local_of(value)) != strides_of(local_of(param)):
                state[name] = torch.empty_like(param, dtype=value.dtype, requires_grad=False).copy_(value)

    def read(self, slot: Slot) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns master weight and momentum in the compute dtype: the stored tensors themselves if they have it."""
        return slot.param.to(compute_dtype(slot.param)), slot.state["exp_avg"]

    def write(self, slot: Slot, param_N: torch.Tensor, exp_avg_N: torch.Tensor) -> None:
        """Stores the updated tensors that `read` returned."""
        for stored, updated in ((slot.param, param_N), (slot.state["exp_avg"], exp_avg_N)):
            if stored is not updated:
                stored.copy_(updated)

    def encode(self, param: torch.Tensor, state: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
        """Stores a floating-point value of the parameter's size; a master weight goes into the parameter."""
        (param if name == "master_param" else state[name]).copy_(value.view(param.shape))


def compute_dtype(param: torch.Tensor) -> torch.dtype:
    """Returns the dtype of a parameter's update and momentum: float64 for a float64 parameter, else float32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def check_forms(param: torch.Tensor, state: dict[str, Any], forms: Forms, place: tuple[int, int]) -> None:
    """Raises ValueError if a state tensor does not fit its parameter: a compiled step would read it as another type or size.

    An assignment to `param.data` changes the parameter and leaves the state as it was. Reads no element. `forms` are those of
    the layout for this rank's part of the parameter; `place` is (number of the group, number of the parameter in it).
    """
    for name, (dtype, shape) in forms.items():
        value = None if name not in state else local_of(state[name])
        if value is None or value.dtype != dtype or value.shape != shape or value.device != param.device:
            found = "missing" if value is None else f"{value.dtype}, shape {tuple(value.shape)}, on {value.device}"
            raise ValueError(
                f"{name} of parameter {place[1]} in group {place[0]} is {found}, but the parameter is now {param.dtype}, shape "
                f"{tuple(param.shape)}, on {param.device} and needs {dtype}, shape {tuple(shape)}: undo the change; or convert "
                "the state by optimizer.load_state_dict(optimizer.state_dict()) if only dtype or device changed, or drop it "
                "by `del optimizer.state[parameter]`"
            )


def lion_update(
    param_N: torch.Tensor,
    grad_N: torch.Tensor,
    exp_avg_N: torch.Tensor,
    lr: float | torch.Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    caution: torch.Tensor | None = None,
) -> None:
    """Applies LION's equations in place (Chen et al. 2023; Dong, Li and Lin, arXiv 2411.07724, Algorithm 1).

    Every operation rounds once. `alpha=`, `lerp` and `addcmul` are not used: whether they fuse a multiplication into an
    addition depends on an element's place in the tensor.

    Args:
        param_N: θ (the master weight), in the compute dtype, any shape.
        grad_N: g, same shape and dtype; not changed.
        exp_avg_N: m, same shape and dtype.
        lr: η; a float or a 0-d tensor.
        betas: (β1, β2).
        weight_decay: λ.
        caution: φ of Cautious LION, one element, or None.
    """
    beta1, beta2 = betas
    interpolation_N = exp_avg_N * beta1 + grad_N * (1 - beta1)
    nan_if_not_finite_N = interpolation_N - interpolation_N  # else 0; sign alone turns NaN into 0, inf into 1
    direction_N = interpolation_N.sign() + nan_if_not_finite_N
    if caution is not None:
        direction_N = direction_N * torch.where(direction_N * grad_N > 0, caution, 0.0)
    param_N.sub_((direction_N + param_N * weight_decay) * lr)
    exp_avg_N.copy_(exp_avg_N * beta2 + grad_N * (1 - beta2))


def reference_step(slots: Sequence[Slot], layout: PlainLayout, begin: bool, multiplier: torch.Tensor | None) -> None:
    """Applies `lion_update` to one parameter after the other, to the negated gradient if its group maximizes.

    Args:
        slots: parameters with gradient, state and group.
        layout: how the state is kept.
        begin: whether a momentum that is NaN has not begun and takes the gradient (m_0 = g_1).
        multiplier: one element, or several, that every gradient is multiplied by in turn; or None.
    """
    for slot in slots:
        param_N, exp_avg_N = layout.read(slot)
        grad_N = slot.grad.to(param_N.dtype)
        for factor in () if multiplier is None else multiplier.view(-1):
            grad_N = grad_N * factor
        if slot.group.get("maximize"):
            grad_N = -grad_N
        if begin:
            exp_avg_N.copy_(torch.where(exp_avg_N.isnan(), grad_N, exp_avg_N))
        group = slot.group
        lion_update(param_N, grad_N, exp_avg_N, rate_of(group), group["betas"], group["weight_decay"], slot.caution)
        layout.write(slot, param_N, exp_avg_N)


def rate_of(group: dict[str, Any]) -> float | torch.Tensor:
    """Returns a group's rate, a number or a 0-d tensor: one of shape [1] would turn a 0-d parameter into one of shape [1]."""
    lr: float | torch.Tensor = group["lr"]
    return lr.view(()) if isinstance(lr, torch.Tensor) else lr


def strides_of(tensor: torch.Tensor) -> list[int]:
    """Returns the strides of the dimensions with more than one element; the others do not affect the memory order."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def is_sharded(param: torch.Tensor) -> bool:
    """Returns whether a tensor is a DTensor."""
    return hasattr(param, "to_local")


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this rank's shard of a DTensor, or any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def check_choice(name: str, given: str, allowed: Sequence[str]) -> None:
    """Raises ValueError if a setting is not one of the allowed values."""
    if given not in allowed:
        raise ValueError(f"{name} = {given!r}: needs one of {', '.join(allowed)}")


def is_in_range(value: Any, end: float) -> bool:
    """Returns whether a setting is a number, at least 0 and below `end`, by which a tensor can be multiplied."""
    # float() also takes text, Decimal, Fraction and arrays. numpy's numbers have a dtype, but unlike arrays no items to set.
    is_numpys = hasattr(value, "dtype") and not hasattr(value, "__setitem__")
    is_number = (isinstance(value, (int, float, torch.Tensor)) and not isinstance(value, bool)) or is_numpys
    try:
        return is_number and 0 <= float(value) < end
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False


def check_rates(group: dict[str, Any]) -> None:
    """Raises ValueError if a group's learning rate or weight decay is not a finite number, 0 or above."""
    lr = group["lr"]
    if isinstance(lr, torch.Tensor) and (lr.numel() != 1 or lr.dtype != torch.float32):
        raise ValueError(f"lr is a tensor of {lr.numel()} elements, {lr.dtype}: needs one element, torch.float32")
    for name in ("lr", "weight_decay"):
        if not is_in_range(value := group[name], math.inf):  # waits for the device once, when a group is added
            yaml = "; convert the text with float() (YAML reads 1e-4 as text)" if isinstance(value, str) else ""
            raise ValueError(f"{name} = {value!r}: needs a finite number, 0 or above{yaml}")


def check_params(group: dict[str, Any]) -> None:
    """Raises ValueError if a parameter's dtype or layout is not supported."""
    for param in group["params"]:
        if param.dtype not in SUPPORTED_DTYPES or param.layout != torch.strided:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is {param.dtype}, {param.layout}: needs a dense "
                "float32, bfloat16, float16 or float64 tensor"
            )


def check_group(group: dict[str, Any]) -> None:
    """Raises ValueError if a group's options or a parameter's dtype or layout are not supported."""
    check_rates(group)
    betas = group["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2 or not all(is_in_range(beta, 1) for beta in betas):
        raise ValueError(f"betas = {betas}: needs two numbers, each at least 0 and below 1")
    if not isinstance(group["maximize"], bool):
        raise ValueError(f"maximize = {group['maximize']!r}: needs True or False")
    for name, value in FOREIGN_OPTIONS.items():
        if bool(group.get(name, value)) != value:
            raise ValueError(
                f"{name} = {group[name]}, an option of another LION: needs {value}, as this one always steps so"
            )
    if (caution := bool(group.get("caution", group["cautious"]))) != group["cautious"]:
        raise ValueError(f"caution = {caution}, timm's name for `cautious`: needs Lion(cautious={caution})")
    check_params(group)


def check_saved_keys(group: dict[str, Any], needed: Sequence[str], known: set[str], owner: str) -> None:
    """Raises ValueError if a saved group lacks a key that this optimizer needs, or has one that it does not know."""
    if missing := [name for name in needed if name not in group]:
        raise ValueError(f"a group of the state has no {', '.join(missing)}: needs a state of {owner}")
    if unknown := sorted(set(group) - known):
        hint = "delete it from the state's param_groups, or give this optimizer's group the same key"
        raise ValueError(f"a group of the state has {', '.join(unknown)}, which {owner} does not have: {hint}")


def fit_saved_groups(
    own: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]], settings: dict[str, Any], layout: PlainLayout
) -> list[dict[str, Any]]:
    """Returns groups that were saved, checked, with this optimizer's settings in place of those that they lack.

    Args:
        own: the optimizer's groups.
        saved: the groups of a state dict. Surplus ones are returned as they are: torch refuses another number of groups.
        settings: the saved settings for a group that lacks them.
        layout: how this optimizer keeps its state.

    Raises:
        ValueError: an option is missing, is unknown, or would change the step.
    """
    groups = []
    for mine, group in zip(own, saved, strict=False):
        check_saved_keys(group, ("lr", "betas", "weight_decay"), {*mine, *HARMLESS_KEYS}, "LION")
        for name in settings:
            value = mine.get(name, settings[name])
            if group.get(name, value) != value:
                raise ValueError(
                    f"{name} = {group[name]!r} in the state, {value!r} in this optimizer: build "
                    f"Lion(…, {name}={group[name]!r}) to continue as saved, or change it in the state's param_groups"
                )
            group = {name: value, **group}
        check_group({**group, "params": mine["params"]})
        layout.check_group({**group, "params": mine["params"]})
        groups.append(group)
    return [*groups, *saved[len(groups) :]]


def settle_groups(groups: Sequence[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Gives every group the saved settings that it lacks; software may have replaced the groups by its own.

    Raises:
        ValueError: a group has another value of a setting that holds for the whole optimizer.
    """
    for group in groups:
        for name, value in settings.items():
            if group.setdefault(name, value) != value and name != "maximize":
                raise ValueError(
                    f"{name} = {group[name]!r} in a group of Lion(…, {name}={value!r}): needs one value for all"
                )


def check_saved_state(state: dict[Any, Any], numbers: Sequence[Any]) -> None:
    """Raises ValueError if a saved state is not one of LION, for the parameters that its groups list.

    Args:
        state: from parameter number to state by name.
        numbers: the parameters in the groups.
    """
    if empty := [f"{number}: {type(entry).__name__}" for number, entry in state.items() if not isinstance(entry, dict)]:
        raise ValueError(f"state of parameter {empty[0]}, not a dict: needs a state of LION")
    if strange := sorted({str(name) for entry in state.values() for name in entry} - STATE_DTYPES.keys()):
        raise ValueError(f"state of another optimizer, with {', '.join(strange)}: needs a state of LION")
    if lost := sorted(map(str, state.keys() - set(numbers))):
        raise ValueError(f"state of {', '.join(lost[:3])}, which is in no group: needs the groups it was saved with")
    for number, entry in state.items():
        for name, value in entry.items():
            if name != "step" and not (isinstance(value, torch.Tensor) and value.dtype in STATE_DTYPES[name]):
                kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
                raise ValueError(f"{name} of parameter {number} is {kind}: needs a tensor that a LION saved")


def asks_for_state(groups: Sequence[dict[str, Any]], slots: Sequence[Slot]) -> bool:
    """Returns whether a first step is a request for the state: its rate is 0 and every gradient is 0.

    torch.distributed.checkpoint creates an optimizer's missing state by such a step. It must not count, and must not begin
    a momentum at g_1 = 0. Only rates in host memory are read: torch puts its zeros there, and a rate on a device must not
    make the host wait.
    """
    rates = [group["lr"] for group in groups]
    if any(isinstance(rate, torch.Tensor) and rate.device.type != "cpu" for rate in rates) or any(map(float, rates)):
        return False
    # A wait for the device, which would end the capture of a CUDA graph. The first step waits anyway (triton_check.py).
    if any(slot.grad.is_cuda for slot in slots) and torch.cuda.is_current_stream_capturing():
        return False
    return not any(bool(slot.grad.any()) for slot in slots)


def is_dense(tensor: torch.Tensor) -> bool:
    """Returns whether the elements fill their memory without gap or overlap, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def fit_gradient(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Returns a gradient in the memory order of its parameter, each this rank's part: the gradient itself, or a copy.

    Every implementation addresses parameter, gradient and state by one flat offset. autograd and DDP choose a gradient's
    strides themselves (expanded, or contiguous for a channels_last weight), so the user cannot be asked for other ones.

    Raises:
        ValueError: the parameter has gaps or overlaps, or the gradient is sparse, complex or of another shape.
    """
    if grad.layout != torch.strided or grad.dtype not in SUPPORTED_DTYPES or grad.shape != param.shape:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} has a gradient of {grad.dtype}, {grad.layout}, shape "
            f"{tuple(grad.shape)}: needs a dense real gradient of that shape; turn off `sparse=True`"
        )
    if grad.device != param.device:
        raise ValueError(f"a parameter on {param.device} has a gradient on {grad.device}: needs both on one device")
    if not is_dense(param):
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)}, strides {param.stride()}: needs one whose elements fill its "
            "memory without gap or overlap; make the parameter from `tensor.contiguous()`"
        )
    if strides_of(grad) == strides_of(param):
        return grad
    return torch.empty_like(param, dtype=grad.dtype, requires_grad=False).copy_(grad)
