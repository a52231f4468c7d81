"""Transformer Engine's fused cross-entropy without a GPU: stand-ins in pure torch, and the interpreted real kernels.

Each stand-in treats its logits as some versions of Transformer Engine do. The real kernels are the Triton kernels of
the PyPI wheels; Triton's interpreter runs them if TRITON_INTERPRET=1 is set before Triton is first imported.
"""

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def loss_and_gradient(logits: Tensor, targets: Tensor, group: Any, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return the vocabulary-parallel cross-entropy in float32 and its gradient, softmax minus one-hot."""
    z, columns = logits.float(), logits.shape[-1]
    maximum = z.amax(-1)
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    exponentials = torch.exp(z - maximum.unsqueeze(-1))
    total = exponentials.sum(-1)
    index = targets - dist.get_rank(group) * columns
    here = (index >= 0) & (index < columns)
    target = (z.gather(-1, index.clamp(0, columns - 1).unsqueeze(-1)).squeeze(-1) - maximum) * here
    for part in (total, target):
        dist.all_reduce(part, group=group)
    counts = (targets != ignore_index).float()
    gradient = exponentials / total.unsqueeze(-1)
    gradient.scatter_add_(-1, index.clamp(0, columns - 1).unsqueeze(-1), -here.float().unsqueeze(-1))
    return (total.log() - target) * counts, gradient * counts.unsqueeze(-1)


class OverwritesInForward(torch.autograd.Function):
    """Up to 2.17 the forward pass overwrites the logits with the gradient, in the logits' dtype."""

    @staticmethod
    def forward(ctx, inp, target, smoothing, reduce_loss, group, ignore_index, is_cg_capturable):
        assert is_cg_capturable and not reduce_loss
        loss, gradient = loss_and_gradient(inp, target, group, ignore_index)
        inp.copy_(gradient)
        ctx.save_for_backward(inp.detach())
        return loss

    @staticmethod
    def backward(ctx, grad):
        (stored,) = ctx.saved_tensors
        return stored.mul_(grad.unsqueeze(-1)), None, None, None, None, None, None


class KeepsFloat32(torch.autograd.Function):
    """In 2.18 the forward pass keeps the logits and saves a float32 gradient."""

    @staticmethod
    def forward(ctx, inp, target, smoothing, reduce_loss, group, ignore_index, is_cg_capturable):
        loss, gradient = loss_and_gradient(inp, target, group, ignore_index)
        ctx.save_for_backward(gradient)
        ctx.dtype = inp.dtype
        return loss

    @staticmethod
    def backward(ctx, grad):
        (stored,) = ctx.saved_tensors
        return (stored * grad.unsqueeze(-1)).to(ctx.dtype), None, None, None, None, None, None


class OverwritesInBackward(torch.autograd.Function):
    """From 2.19 on, with overwrite_input, the logits are kept until the one backward pass, which overwrites them."""

    @staticmethod
    def forward(ctx, inp, target, group, ignore_index):
        ctx.save_for_backward(inp.detach(), target)
        ctx.group, ctx.ignore_index, ctx.used = group, ignore_index, False
        return loss_and_gradient(inp, target, group, ignore_index)[0]

    @staticmethod
    def backward(ctx, grad):
        assert not ctx.used, "one backward pass only"
        ctx.used = True
        stored, target = ctx.saved_tensors
        _, gradient = loss_and_gradient(stored, target, ctx.group, ctx.ignore_index)
        return stored.copy_(gradient * grad.unsqueeze(-1)), None, None, None


def new_signature(
    inp, target, label_smoothing=0.0, reduce_loss=False, dist_process_group=None, ignore_idx=-100,
    is_cg_capturable=False, *, overwrite_input=False, _input=None,
):  # fmt: skip
    """From 2.19 on ``is_cg_capturable`` causes a warning, and ``overwrite_input`` saves a copy."""
    assert not is_cg_capturable and overwrite_input
    return OverwritesInBackward.apply(inp, target, dist_process_group, ignore_idx)


def middle_signature(
    inp, target, label_smoothing=0.0, reduce_loss=False, dist_process_group=None, ignore_idx=-100,
    is_cg_capturable=False, *, _input=None,
):  # fmt: skip
    return KeepsFloat32.apply(
        inp, target, label_smoothing, reduce_loss, dist_process_group, ignore_idx, is_cg_capturable
    )


STAND_INS: dict[str, Callable[..., Tensor]] = {
    "2.9 to 2.17": OverwritesInForward.apply,
    "2.18": middle_signature,
    "2.19 to 2.20": new_signature,
}


def load_wheel(folder: Path) -> Callable[..., Tensor]:
    """Import only the fused cross-entropy of an unpacked Transformer Engine wheel."""
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        del sys.modules[name]
    for name in ("", ".common", ".common.triton", ".pytorch", ".pytorch.triton"):
        module = types.ModuleType(f"transformer_engine{name}")
        module.__path__ = [str(folder / "transformer_engine" / Path(*name.split(".")[1:]))]
        sys.modules[module.__name__] = module
    jit = types.ModuleType("transformer_engine.pytorch.jit")
    jit.no_torch_dynamo = lambda: lambda function: function
    sys.modules[jit.__name__] = jit
    loaded = importlib.import_module("transformer_engine.pytorch.cross_entropy")
    if hasattr(loaded, "_validate_inputs"):
        loaded._validate_inputs = lambda *_: None  # it asks for a CUDA tensor
    return loaded.parallel_cross_entropy


def compute_bfloat16(monkeypatch: Any) -> None:
    """Patch Triton's interpreter to compute with bfloat16 as a GPU does.

    Without the patch it has no bfloat16 constants, adds the bits of two numbers instead of the numbers, and truncates
    float32 where a GPU rounds to the nearest.
    """
    import numpy
    from triton import language
    from triton.runtime import interpreter

    def to_bits(values: Any) -> Any:
        return torch.from_numpy(numpy.ascontiguousarray(values, numpy.float32)).bfloat16().view(torch.uint16).numpy()

    def to_values(bits: Any) -> Any:
        return torch.from_numpy(numpy.ascontiguousarray(bits, numpy.uint16)).view(torch.bfloat16).float().numpy()

    convert, compute = interpreter._convert_float, interpreter.InterpreterBuilder.binary_op

    def convert_rounding(values: Any, kind: Any, wanted: Any, mode: Any) -> Any:
        if (kind, wanted) == (language.float32, language.bfloat16):
            return to_bits(values)
        return convert(values, kind, wanted, mode)

    def compute_values(builder: Any, left: Any, right: Any, operation: Callable[..., Any]) -> Any:
        if left.dtype.scalar != language.bfloat16:
            return compute(builder, left, right, operation)
        return interpreter.TensorHandle(
            to_bits(operation(to_values(left.data), to_values(right.data))), language.bfloat16
        )

    monkeypatch.setattr(interpreter, "_convert_float", convert_rounding)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "binary_op", compute_values)
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "get_bf16",
        lambda _, value: interpreter.TensorHandle(to_bits([value]), language.bfloat16),
        raising=False,
    )
