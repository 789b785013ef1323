"""Scores of every layer's outputs from one forward and one backward of a batch.

Relevance travels as a multiplier m, so that what reaches a value x is x·m. Then sums, joins, averages and reshapes, by
plain automatic differentiation, share out in proportion, and a maximum gives all to its winner. Only these are changed
on the way: linear layers and convolutions follow a rule of `ops.relevance`, with a batch norm behind a convolution
folded into it; non-linearities pass relevance through; gates, softmaxes and denominators of norms count as constant.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from compressor.ops.relevance import RULES

CONVOLUTIONS = {
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
}  # fmt: skip
PASSED_THROUGH = {
    functional.relu, functional.relu6, functional.hardtanh, functional.gelu, functional.silu, functional.hardswish,
    functional.leaky_relu, functional.elu, functional.mish, functional.tanh, torch.relu, torch.tanh, Tensor.relu,
    Tensor.tanh, functional.prelu, torch.prelu,
}  # fmt: skip
CONSTANT = {
    functional.softmax, functional.sigmoid, functional.hardsigmoid, torch.softmax, torch.sigmoid, torch.rsqrt,
    Tensor.softmax, Tensor.sigmoid, Tensor.rsqrt,
}  # fmt: skip
ENDS = (CONSTANT - {torch.rsqrt, Tensor.rsqrt}) | {
    functional.log_softmax, torch.log_softmax, Tensor.log_softmax, functional.logsigmoid,
}  # fmt: skip
"""What a network that gives probabilities ends in: the logits before it are explained."""


_SCORED, _COLUMNS = 2**22, 64
"""Values that are scored at a time, of so many outputs or a multiple."""


@dataclass(frozen=True)
class Rule:
    """A rule of `ops.relevance` by name, with its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Composite:
    """What is scored, and by which rule a layer passes relevance on.

    box   z^B for the layer that reads the input
    own   weight's name -> the rule of its layer, before that of its kind
    """

    criterion: Literal["lrp", "taylor", "gradient", "magnitude"]
    conv: Rule
    linear: Rule
    box: bool
    own: Mapping[str, Rule] = field(default_factory=dict)


@dataclass
class _Call:
    """A layer that ran: how to run it again with other weights."""

    forward: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    weight: Tensor
    name: str
    rule: Rule


class _Ruled(torch.autograd.Function):
    """A layer's output whose gradient is the multiplier of the relevance that the rule gives its input."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, output: Tensor, call: _Call) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(inputs, weight, output)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *multipliers: Tensor) -> tuple[Tensor, None, None, None]:
        inputs, weight, output = ctx.saved_tensors
        forward, rule = ctx.call.forward, ctx.call.rule

        def transposed(w: Tensor, s: Tensor) -> Tensor:
            with torch.enable_grad():
                x = inputs.detach().requires_grad_()
                return torch.autograd.grad(forward(x, w), x, s)[0]

        with torch.no_grad():
            found = RULES[rule.name](forward, transposed, inputs, weight, output * multipliers[0], **rule.options)
            return torch.where(inputs == 0, 0, found / torch.where(inputs == 0, 1, inputs)), None, None, None


class Observed(TorchFunctionMode):
    """Watches a forward: `outputs` holds (name of the weight, output, its channels' dimension) of each layer."""

    def __init__(self, names: Mapping[int, str], composite: Composite) -> None:
        super().__init__()
        self.names, self.composite = names, composite
        self.outputs: list[tuple[str, Tensor, int]] = []
        self._calls: dict[int, tuple[_Call, int]] = {}
        self._ended: deque[tuple[Any, Tensor]] = deque(maxlen=8)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in CONVOLUTIONS or func is functional.linear:
            return self._layer(func, *args, **kwargs)
        if func in (torch.addmm, torch.matmul, Tensor.matmul, Tensor.__matmul__) and self._reads(func, args):
            return self._product(func, args)
        found = func(*args, **kwargs)
        if func is functional.batch_norm and id(args[0]) in self._calls:
            return self._folded(args, kwargs, found)
        if func in ENDS and self.composite.criterion == "lrp":
            found = found.detach()
        if func in ENDS:
            self._ended.append((found, args[0]))
        if self.composite.criterion != "lrp":
            return found
        if func in PASSED_THROUGH:
            x = args[0]
            return x * torch.where(x == 0, 0, found / torch.where(x == 0, 1, x)).detach()
        if func in CONSTANT:
            return found if func in ENDS else found.detach()
        if func is functional.scaled_dot_product_attention:
            return func(args[0].detach(), args[1].detach(), *args[2:], **kwargs)
        if func is functional.layer_norm:
            return _normalised(found, *args, **kwargs)
        return found

    def logits(self, output: Tensor) -> Tensor:
        """What an output was before the softmax or sigmoid that the network ends in; else the output itself."""
        return next((before for after, before in reversed(self._ended) if after is output), output)

    def _reads(self, func: Any, args: tuple) -> bool:
        weight = args[2] if func is torch.addmm else args[1]
        return isinstance(weight, Tensor) and id(weight) in self.names

    def _layer(self, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **kw: Any) -> Tensor:
        output = func(x, weight, bias, *rest, **kw)
        linear = func is functional.linear
        return self._ran(lambda a, w: func(a, w, None, *rest, **kw), x, weight, output, linear)

    def _product(self, func: Any, args: tuple) -> Tensor:
        """GPT-2's linear, and x @ w of a module's own parameter (in, out)."""
        x, weight = args[1:3] if func is torch.addmm else args[:2]
        return self._ran(lambda a, w: a @ w, x, weight, func(*args), True)

    def _ran(self, forward: Any, x: Tensor, weight: Tensor, output: Tensor, linear: bool) -> Tensor:
        name, dim = self.names.get(id(weight)), -1 if linear else 1
        if self.composite.criterion == "lrp":
            rule = self.composite.own.get(name or "", self.composite.linear if linear else self.composite.conv)
            if self.composite.box and not linear and not x.requires_grad:
                over = [d for d in range(x.dim()) if d != 1]
                rule = Rule("zbox", {"low": x.amin(over, keepdim=True), "high": x.amax(over, keepdim=True)})
            call = _Call(forward, x, weight, name or "", rule)
            output = _Ruled.apply(x, weight, output.detach(), call)  # type: ignore[assignment]
            if not linear:
                self._calls[id(output)] = (call, len(self.outputs))
        if name is not None:
            self.outputs.append((name, output, dim))
        return output

    def _folded(self, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        """A batch norm behind a convolution is part of it: the weights are scaled, the output is the norm's."""
        call, place = self._calls[id(args[0])]
        _, variance, gamma = (list(args[1:4]) + [None] * 3)[:3]
        gamma = kwargs.get("weight", gamma)
        variance = kwargs.get("running_var", variance)
        epsilon = kwargs.get("eps", args[7] if len(args) > 7 else 1e-5)
        scale = (variance + epsilon).rsqrt() * (1 if gamma is None else gamma)
        transposed = output.shape[1] != call.weight.shape[0]
        shape = [-1 if d == (1 if transposed else 0) else 1 for d in range(call.weight.dim())]
        if transposed and scale.numel() != call.weight.shape[1]:
            return output  # a transposed convolution in groups: its norm stays a layer of its own
        folded = (call.weight * scale.view(shape)).detach().requires_grad_()
        call = _Call(call.forward, call.inputs, folded, call.name, call.rule)
        found = _Ruled.apply(call.inputs, folded, output.detach(), call)
        if place < len(self.outputs) and self.outputs[place][0] == call.name:
            self.outputs[place] = (call.name, found, 1)  # type: ignore[assignment]
        return found  # type: ignore[return-value]


def _normalised(
    output: Tensor, x: Tensor, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    """A layer norm whose deviation counts as constant."""
    dims = list(range(-len(shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    found = centred * (x.var(dims, keepdim=True, correction=0) + eps).rsqrt().detach()
    found = found if weight is None else found * weight
    return found if bias is None else found + bias


def attribute(
    names: Mapping[int, str], call: Callable[[dict[str, Tensor]], Any], batches: Sequence[dict[str, Tensor]],
    labels: Sequence[Tensor] | None, composite: Composite,
) -> dict[str, Tensor]:  # fmt: skip
    """Weight's name -> score of each of its layer's outputs (out,), float64, summed over the batches.

    lrp: Σ|x·m|, gradient: Σ|g|, taylor: Σ over samples of |mean over positions of x·g|, g of the cross-entropy.

    Args:
        names: Of the weights, by their identity.
        call: The forward.
        labels: (n,) per batch, or (n, tokens), −100 where there is none; None takes the largest output for the class.
    """
    found: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        label = None if labels is None else labels[number]
        for name, score in _scores(names, lambda batch=batch: call(batch), label, composite, number):
            found[name] = found[name] + score if name in found else score
    return found


def _scores(
    names: Mapping[int, str], run: Callable[[], Any], label: Tensor | None, composite: Composite, number: int
) -> Iterator[tuple[str, Tensor]]:
    """Of one batch, call by call; what it leaves goes before the next one runs."""
    mode = Observed(names, composite)
    with torch.enable_grad(), mode:
        output = mode.logits(first_output(run()))
    start = start_of(output.detach(), label, composite.criterion, torch.Generator().manual_seed(number))
    outputs = [each for each in mode.outputs if each[1].requires_grad]
    gradients = list(torch.autograd.grad(output, [value for _, value, _ in outputs], start, allow_unused=True))
    del mode, output, start
    while outputs:
        (name, value, dim), gradient = outputs.pop(0), gradients.pop(0)
        if gradient is not None:
            yield name, _score(value.detach(), gradient, dim, composite.criterion)


def start_of(output: Tensor, label: Tensor | None, criterion: str, generator: torch.Generator) -> Tensor:
    """The gradient at the output: of classes (n, classes) or (n, tokens, classes), or of what has no classes.

    lrp starts with relevance 1 per sample at the class, 1 / logit (a share of it at each token); others with the
    cross-entropy's gradient. An output of more than two dimensions without labels is a hidden state: its relevance is
    its own square, 1 in sum; gradients start with random signs, since E(vᵀΔy)² = ‖Δy‖² for what a unit changes in it.
    """
    if label is None and output.dim() != 2:
        if criterion != "lrp":
            return torch.randint(0, 2, output.shape, generator=generator).to(output.dtype) * 2 - 1
        rows = output.flatten(1)
        return (rows / rows.square().sum(1, keepdim=True)).view_as(output)
    target = output.argmax(-1) if label is None else label
    known = (target >= 0).unsqueeze(-1).to(output.dtype)
    place = target.clamp(min=0).unsqueeze(-1)
    # Below in place: of a language model the logits are most of the memory.
    if criterion != "lrp":
        return output.softmax(-1).scatter_add_(-1, place, -known).mul_(known)
    logit = output.gather(-1, place) * known
    share = known / torch.where(logit == 0, 1, logit)
    share = share / known.flatten(1).sum(1).clamp(min=1).view(-1, *[1] * (output.dim() - 1))
    return torch.zeros_like(output).scatter_(-1, place, share)


def _score(value: Tensor, gradient: Tensor, dim: int, criterion: str) -> Tensor:
    """(out,) of one layer; values (n, …, out) or (n, out, …)."""
    values, gradients = (each.movedim(dim, -1) for each in (value, gradient))
    if values.dim() == 2:
        values, gradients = values[:, None], gradients[:, None]
    values, gradients = values.flatten(1, -2), gradients.flatten(1, -2)
    at_once = max(_COLUMNS, _SCORED // values[..., 0].numel() // _COLUMNS * _COLUMNS)
    parts = zip(values.split(at_once, -1), gradients.split(at_once, -1), strict=True)
    exact = ([each.to(torch.float64, copy=True) for each in pair] for pair in parts)
    return torch.cat([_score_of(value, gradient, criterion) for value, gradient in exact])


def _score_of(values: Tensor, gradients: Tensor, criterion: str) -> Tensor:
    if criterion == "gradient":
        return gradients.abs_().sum((0, 1))
    products = values.mul_(gradients)
    return products.mean(1).abs().sum(0) if criterion == "taylor" else products.abs_().sum((0, 1))


def first_output(output: Any) -> Tensor:
    """The first tensor of what a forward returns."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output
