"""Recurrences over the tokens of a text as one operator, ONNX's Scan, so that a traced graph reads texts of any length.

transformers computes them in loops over tokens, or over chunks of them, of which torch.onnx would trace as many as its
example has. Here they are one step, as the papers write it, that torch's `scan` repeats:

torch_chunk_gated_delta_rule  Qwen3-Next, Qwen3.5, OLMo Hybrid: a decay of each head (Gated DeltaNet, arXiv 2412.06464)
chunk_kimi_delta_attention    Kimi Linear: a decay of each channel (arXiv 2510.26692)
mamba_selective_scan          Mamba, Jamba, Zamba (arXiv 2312.00752)
mamba2_chunk_scan             Mamba2, Bamba, Falcon-H1, Nemotron-H, Granite 4 (arXiv 2405.21060)

Arguments and results are those of transformers' functions.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.nn import functional as F

Step = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]]


@contextlib.contextmanager
def scanned(network: nn.Module) -> Iterator[None]:
    """Meanwhile the classes of this network's modules call the recurrences of this file."""
    with contextlib.ExitStack() as stack:
        for name in {type(module).__module__ for module in network.modules()}:
            for function in _RECURRENCES:
                if hasattr(sys.modules[name], function.__name__):
                    stack.enter_context(mock.patch.object(sys.modules[name], function.__name__, function))
        yield


def torch_chunk_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, chunk_size: int = 64,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Each token decays the state, which maps keys to values, and corrects what its key is mapped to.

    Args:
        query, key, value: (batch, tokens, heads, size); of keys and queries each head may serve several of the values.
        g: Logarithms of the decays: (batch, tokens, heads), or of each of the key's channels.
        beta: How much is corrected, (batch, tokens, heads).
        chunk_size: Not used.
    """
    dtype, heads = value.dtype, value.shape[2]
    if key.shape[2] != heads:
        query, key = (each.repeat_interleave(heads // key.shape[2], dim=2) for each in (query, key))
    query, key, value, beta, g = (each.float() for each in (query, key, value, beta, g))
    if use_qk_l2norm_in_kernel:
        query, key = (each * torch.rsqrt((each * each).sum(-1, keepdim=True) + 1e-6) for each in (query, key))
    query = query * key.shape[-1] ** -0.5
    decay = g.exp() if g.dim() == 4 else g.exp()[..., None]
    zeros = value.new_zeros(value.shape[0], heads, key.shape[-1], value.shape[-1])
    start = zeros if initial_state is None else initial_state.to(value)
    state, found = _over_tokens(_corrected, start, query, key, value, decay, beta[..., None])
    return found.to(dtype), state if output_final_state else None


def chunk_kimi_delta_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """As `torch_chunk_gated_delta_rule`; its decays are of channels."""
    return torch_chunk_gated_delta_rule(*args, **kwargs)


def mamba_selective_scan(
    hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
    return_last_state: bool = False, **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Each channel keeps a state, which decays by A and takes B of what comes in; C of it goes out.

    Args:
        hidden_states, dt, z: (batch, channels, tokens).
        A: (channels, size of a state).
        B, C: (batch, size of a state, tokens).
    """
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    dt = F.softplus(dt) if delta_softplus else dt
    x, times = (each.float().transpose(1, 2)[:, :, None, :] for each in (hidden_states, dt))  # of one head
    into, out = (each.float().transpose(1, 2)[:, :, None, :] for each in (B, C))
    start = x.new_zeros(x.shape[0], 1, x.shape[-1], A.shape[-1])
    state, found = _over_tokens(_selected, start, x * times, times[..., None] * A.float(), into, out)
    found = found[:, :, 0].transpose(1, 2).to(hidden_states.dtype)
    if D is not None:
        found = found + hidden_states * D[None, :, None]
    if z is not None:
        found = found * F.silu(z)
    return (found, state[:, 0]) if return_last_state else found


def mamba2_chunk_scan(
    hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int,
    D: Tensor | None = None, dt_bias: Tensor | None = None, initial_states: Tensor | None = None,
    dt_softplus: bool = False, dt_limit: tuple[float, float] = (0.0, float("inf")), return_final_states: bool = False,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """As `mamba_selective_scan`, but all channels of a head decay alike.

    Args:
        hidden_states: (batch, tokens, heads, channels).
        dt: (batch, tokens, heads).
        A, D: (heads,).
        B, C: (batch, tokens, groups of heads, size of a state).
        chunk_size: Not used.
    """
    heads = hidden_states.shape[2]
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit).float()
    x = hidden_states.float()
    into, out = (each.float().repeat_interleave(heads // each.shape[2], dim=2) for each in (B, C))
    start = x.new_zeros(x.shape[0], heads, x.shape[-1], B.shape[-1])
    start = start if initial_states is None else initial_states.to(x)
    decay = (A.float() * dt)[..., None, None]
    state, found = _over_tokens(_selected, start, x * dt[..., None], decay, into, out)
    if D is not None:
        found = found + D[..., None] * x
    return (found, state) if return_final_states else found


_RECURRENCES = (torch_chunk_gated_delta_rule, chunk_kimi_delta_attention, mamba_selective_scan, mamba2_chunk_scan)


def _corrected(state: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    query, key, value, decay, beta = token
    state = state * decay[..., None]
    kept = (key[..., None, :] @ state)[..., 0, :]
    state = state + key[..., None] * ((value - kept) * beta)[..., None, :]
    return state, (query[..., None, :] @ state)[..., 0, :]


def _selected(state: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    x, decay, into, out = token
    state = state * decay.exp() + x[..., None] * into[..., None, :]
    return state, (state @ out[..., None])[..., 0]


def _over_tokens(step: Step, start: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The last state, and what each step gives: (batch, tokens, …), as all that it is given."""
    state, found = scan(step, start, tuple(each.transpose(0, 1) for each in inputs), dim=0)
    return state, found.transpose(0, 1)
