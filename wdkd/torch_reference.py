"""The distillation step and the exact worst-case step once more, in eager PyTorch: the other side of `launch/benchmark.py`.

Written as for speed in PyTorch: batched, the library's own layers, activations in place, second derivatives by `create_graph`
(torch.compile does not differentiate twice). Networks are float32 and run on whatever device, in whatever memory format, the caller
moves them and the images to.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from wdkd import models
from wdkd.errors import UsageError

_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
"""What PyTorch calls flax's arrays."""
_AXES = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
"""By number of dimensions, the flax axes in PyTorch's order: (in, out) -> (out, in) and HWIO -> OIHW."""


def mirror(model: models.CNN | models.ResNet, variables: Mapping[str, Any]) -> nn.Module:
    """A PyTorch network whose logits are those of `models.apply_network(model, variables, x, train=False)`.

    It maps pixels (B, C, H, W), float32 in [0, 1], to logits (B, classes), is in evaluation mode and owns copies of the weights.
    Gradients agree too, save where pixels of a pooling window are equal: `models` divides a maximum's gradient, PyTorch picks one.
    As teacher it must be frozen: `mirror(model, variables).requires_grad_(False)`.

    Args:
      model: of group norm, or of batch norm, which is then the running statistics'.
      variables: {"params", "batch_stats" with batch norm, and perhaps "input", the pixels' mean and deviation}.

    Returns:
      A module whose layers have the names of flax's.

    Raises:
      UsageError: for another class of network, one that computes in less than float32, or a layer that has no counterpart here.
    """
    known = {models.CNN: _CNN, models.ResNet: _ResNet}
    if type(model) not in known:
        raise UsageError(f"{type(model).__name__} has no PyTorch reference; known: {', '.join(kind.__name__ for kind in known)}")
    if model.dtype not in (None, jnp.float32):
        raise UsageError(f"the PyTorch reference computes in float32, not in {jnp.dtype(model.dtype).name}")
    network = known[type(model)](model, variables)
    arrays = flatten_dict(variables["params"]) | flatten_dict(variables.get("batch_stats", {}))
    network.load_state_dict({_torch_name(path): _to_torch(array) for path, array in arrays.items()})
    return network.eval()


def kd_step(student: nn.Module, teacher: nn.Module, x: Tensor, temperature: float) -> tuple[Tensor, list[Tensor]]:
    """mean_i T^2 KL(p_i || q_i), p = softmax(teacher / T), q = softmax(student / T), and its gradient in the student's parameters.

    Args:
      student, teacher: as `mirror` makes them.
      x: (B, C, H, W), pixels.
      temperature: T > 0.

    Returns:
      (loss, in nats, a scalar without graph; gradients in the order of student.parameters()).
    """
    with torch.no_grad():
        teacher_logits = teacher(x)
    loss = _total_divergence(student(x), teacher_logits, temperature) / len(x)
    return loss.detach(), list(torch.autograd.grad(loss, list(student.parameters())))


def worst_case_step(
    student: nn.Module, teacher: nn.Module, x: Tensor, temperature: float, epsilon: float, through_teacher: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """mean_i l(x_i) + epsilon * mean_i ||grad_{x_i} l(x_i)||_2 with l that of `kd_step`, and its gradient in the student's parameters.

    The value is `input_gradients.worst_case`'s, save that norms below 1e-19, whose squares underflow, count as 0.

    Args:
      student, teacher: as `mirror` makes them, the teacher frozen.
      x: (B, C, H, W), pixels.
      temperature: T > 0.
      epsilon: radius of the ball, in pixel units.
      through_teacher: whether the input gradient goes through the teacher too, or sees its outputs as constants.

    Returns:
      (objective, a scalar without graph; gradients in the order of student.parameters()).

    Raises:
      UsageError: a parameter of the teacher requires a gradient, which would make its graph larger for nothing.
    """
    if any(parameter.requires_grad for parameter in teacher.parameters()):
        raise UsageError("the teacher has parameters that require gradients; freeze it with teacher.requires_grad_(False)")
    x = x.detach().requires_grad_()
    with torch.set_grad_enabled(through_teacher):
        teacher_logits = teacher(x)
    total = _total_divergence(student(x), teacher_logits, temperature)
    (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    objective = total / len(x) + epsilon * torch.linalg.vector_norm(gradient, dim=(1, 2, 3)).mean()
    return objective.detach(), list(torch.autograd.grad(objective, list(student.parameters())))


def to_flax(network: nn.Module, values: Iterable[Tensor]) -> dict[str, Any]:
    """The tree variables["params"], of NumPy arrays, that `values` are in the layout of flax: the inverse of what `mirror` copies.

    Args:
      network: as `mirror` made it.
      values: one tensor for each of network.parameters(), in their order: the parameters themselves, or gradients.

    Raises:
      ValueError: there are more or fewer values than parameters.
    """
    names = (name for name, _ in network.named_parameters())
    return unflatten_dict({network.flax_paths[name]: _to_numpy(value) for name, value in zip(names, values, strict=True)})


def fuse(network: nn.Module) -> nn.Module:
    """Puts batch norm into the convolution before it, as PyTorch users do for inference; logits stay the same to rounding.

    Changes and returns the network, which no longer has a flax tree of its own. Networks that pool between the two, or have group
    norm, stay as they are.
    """
    pairs = [name.removeprefix("Norm_") for name, layer in network.named_children() if isinstance(layer, nn.BatchNorm2d)]
    for index in pairs if isinstance(network, _ResNet) else ():
        conv, norm = getattr(network, f"Conv_{index}"), getattr(network, f"Norm_{index}")
        setattr(network, f"Conv_{index}", fuse_conv_bn_eval(conv, norm))
        setattr(network, f"Norm_{index}", nn.Identity())
    return network


def _total_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """sum_i of `losses.kl_divergence` of logits (B, classes)."""
    log_q, log_p = ((logits / temperature).log_softmax(1) for logits in (student_logits, teacher_logits))
    return temperature**2 * functional.kl_div(log_q, log_p, reduction="sum", log_target=True)


# --- networks -----------------------------------------------------------------------------------------------------------


class _Network(nn.Module):
    """The layers of the flax tree under their names there. Weights are those of PyTorch's initialisation until they are loaded."""

    def __init__(self, model: Any, variables: Mapping[str, Any]) -> None:
        super().__init__()
        pixels = variables.get("input") or {"mean": model.mean, "std": model.std}
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(np.asarray(pixels[name], np.float32)).view(-1, 1, 1), persistent=False)
        for name, tree in variables["params"].items():
            self.add_module(name, _layer(name, tree))
        self.flax_paths = {_torch_name(path): path for path in flatten_dict(variables["params"])}
        self.blocks = getattr(model, "blocks", None)

    def standardize(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def convolve_normalize(self, index: int, x: Tensor, *, stride: int = 1, halve: bool = False) -> Tensor:
        y = getattr(self, f"Conv_{index}")(x, stride)
        return getattr(self, f"Norm_{index}")(_halve(y) if halve else y)


class _CNN(_Network):
    """`models.CNN`."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.standardize(x)
        for index in range(2 * len(models.STAGES)):
            x = _relu(self.convolve_normalize(index, x, halve=index % 2 == 0))
        return self.head(x.mean((2, 3)))


class _ResNet(_Network):
    """`models.ResNet`. The shortcut's projection, where there is one, comes after the two convolutions of its block."""

    def forward(self, x: Tensor) -> Tensor:
        index = itertools.count()
        x = _relu(self.convolve_normalize(next(index), self.standardize(x)))
        for stage, block in itertools.product(range(len(models.STAGES)), range(self.blocks)):
            stride = 2 if stage > 0 and block == 0 else 1
            y = _relu(self.convolve_normalize(next(index), x, stride=stride))
            y = self.convolve_normalize(next(index), y)
            shortcut = x if x.shape == y.shape else self.convolve_normalize(next(index), x, stride=stride)
            x = _relu(shortcut + y)
        return self.head(x.mean((2, 3)))


class _Convolution(nn.Conv2d):
    """Without bias, and with the padding that XLA calls SAME: ceil(side / stride) outputs, an odd padding one larger at the end."""

    def forward(self, x: Tensor, stride: int = 1) -> Tensor:
        sizes = zip(x.shape[2:], self.kernel_size, strict=True)
        padding = [max((math.ceil(side / stride) - 1) * stride + kernel - side, 0) for side, kernel in sizes]
        if any(both % 2 for both in padding):
            x = functional.pad(x, (0, padding[1] % 2, 0, padding[0] % 2))
        return functional.conv2d(x, self.weight, self.bias, stride=stride, padding=[both // 2 for both in padding])


def _halve(x: Tensor) -> Tensor:
    """2×2 max pooling of (B, c, h, w), unless a side is 4 or less; odd sides round up."""
    return x if min(x.shape[2:]) <= 4 else functional.max_pool2d(x, 2, ceil_mode=True)


_relu: Callable[[Tensor], Tensor] = torch.relu_
"""In place: neither a normalisation nor a sum keeps its result for its derivatives."""


# --- from and to flax ---------------------------------------------------------------------------------------------------


def _layer(name: str, tree: Mapping[str, Any]) -> nn.Module:
    """The PyTorch layer, of any weights, for variables["params"][name]."""
    kind = name.split("_")[0]
    if kind == "Conv":
        height, width, inputs, outputs = tree["kernel"].shape
        return _Convolution(inputs, outputs, (height, width), bias=False)
    if kind == "Norm":
        ((inner, arrays),) = tree.items()
        (channels,) = arrays["scale"].shape
        # Flax's defaults, which differ from one norm to the other.
        return nn.BatchNorm2d(channels, eps=1e-5) if inner == "BatchNorm_0" else nn.GroupNorm(_groups(channels), channels, eps=1e-6)
    if kind == "head":
        return nn.Linear(*tree["kernel"].shape)
    raise UsageError(f"layer {name!r} has no PyTorch reference; known: convolutions, normalisations and the head, not folded")


def _groups(channels: int) -> int:
    """As `models.Norm` chooses them."""
    return max(g for g in range(1, 9) if channels % g == 0 and (g == 1 or channels // g >= 4))


def _torch_name(path: tuple[str, ...]) -> str:
    """("Norm_0", "GroupNorm_0", "scale") -> "Norm_0.weight"."""
    return f"{path[0]}.{_NAMES[path[-1]]}"


def _to_torch(array: Any) -> Tensor:
    array = np.asarray(array)
    return torch.tensor(array.transpose(_AXES[array.ndim]))


def _to_numpy(value: Tensor) -> np.ndarray:
    return np.array(value.detach().cpu().numpy().transpose(np.argsort(_AXES[value.ndim])))
