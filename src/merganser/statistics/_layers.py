"""How a module's parameters meet its input: what a token is, and the gradient of one example.

Every layer sees an input ``x`` and, in a backward pass, the gradient ``g`` with respect to its output. Two questions
are answered here for each kind of layer. For Gram and K-FAC statistics: which rows ``a`` (one per token) does the
weight multiply, and which rows of ``g`` belong to them? For per-example statistics: what is the gradient of each
parameter for each example, as a dense tensor ``(examples, *shape)``?
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from merganser._torch import torch

__all__ = ["Embedding", "Layer", "layer_of"]


class Layer(ABC):
    """A module whose parameters are measured.

    Attributes:
        path: the module's name.
        module: the module.
        parameters: the parameters it answers for: name in the model to name in the module.
    """

    linear = False
    """Whether its weight multiplies rows, so that it has a Gram matrix."""
    transposed = False
    """Whether the weight is stored as (in, out)."""
    one_hot = False
    """Whether the input is indices, which stand for one-hot rows."""

    def __init__(self, path: str, module: torch.nn.Module) -> None:
        self.path = path
        self.module = module
        prefix = f"{path}." if path else ""
        self.parameters = {
            f"{prefix}{name}": name
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.is_floating_point()
        }

    def leading(self, x: torch.Tensor) -> tuple[int, ...] | None:
        """The dimensions of the input that count its rows; None if a row is no token, so that no mask applies."""
        return tuple(x.shape[:-1])

    @property
    def weight(self) -> torch.Tensor:
        """The module's weight."""
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def key(self) -> tuple[Any, ...]:
        """What makes the rows of two layers differ although their input is the same tensor."""
        return (type(self).__name__,)

    def in_size(self) -> int:
        """The length of a row of inputs."""
        raise NotImplementedError

    def out_size(self) -> int:
        """The length of a row of output gradients."""
        raise NotImplementedError

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        """The rows that the weight multiplies, ``(..., in)``."""
        return x

    def outputs(self, g: torch.Tensor) -> torch.Tensor:
        """The rows of the output gradient, ``(..., out)``, in the same order."""
        return g

    @abstractmethod
    def gradient(self, name: str, x: torch.Tensor, g: torch.Tensor, extra: Any) -> torch.Tensor:
        """The gradient of a parameter for each example.

        Args:
            name: the parameter's name in the module.
            x: input, with the examples in the first dimension.
            g: gradient of the summed loss with respect to the output, likewise.
            extra: the other arguments of the call, for layers that call their module again.

        Returns:
            ``(examples, *shape of the parameter)``.
        """


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """``(n, ..., d)`` as ``(n, tokens, d)``."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


class Linear(Layer):
    """``y = a W' + b``, weight ``(out, in)``; gradient of one example ``G' A`` over its tokens."""

    linear = True

    def in_size(self) -> int:
        return int(self.weight.shape[1])

    def out_size(self) -> int:
        return int(self.weight.shape[0])

    def gradient(self, name: str, x: torch.Tensor, g: torch.Tensor, extra: Any) -> torch.Tensor:
        g = _tokens(g)
        return g.sum(1) if name == "bias" else torch.bmm(g.transpose(1, 2), _tokens(x))


class Conv1D(Layer):
    """GPT-2's ``y = a W + b``, weight ``(in, out)``."""

    linear = True
    transposed = True

    def key(self) -> tuple[Any, ...]:
        return ("Linear",)

    def in_size(self) -> int:
        return int(self.weight.shape[0])

    def out_size(self) -> int:
        return int(self.weight.shape[1])

    def gradient(self, name: str, x: torch.Tensor, g: torch.Tensor, extra: Any) -> torch.Tensor:
        g = _tokens(g)
        return g.sum(1) if name == "bias" else torch.bmm(_tokens(x).transpose(1, 2), g)


class Conv2d(Layer):
    """A convolution as a linear map of unfolded patches: a token is an output position, ``in`` is channels x kernel."""

    linear = True

    def _options(self) -> dict[str, Any]:
        module: Any = self.module
        return {"dilation": module.dilation, "padding": module.padding, "stride": module.stride}

    def key(self) -> tuple[Any, ...]:
        module: Any = self.module
        return ("Conv2d", module.kernel_size, *self._options().values())

    def leading(self, x: torch.Tensor) -> tuple[int, ...] | None:
        return None

    def in_size(self) -> int:
        return int(self.weight[0].numel())

    def out_size(self) -> int:
        return int(self.weight.shape[0])

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        kernel: Any = self.module.kernel_size
        return torch.nn.functional.unfold(x, kernel, **self._options()).transpose(1, 2)

    def outputs(self, g: torch.Tensor) -> torch.Tensor:
        return g.flatten(2).transpose(1, 2)

    def gradient(self, name: str, x: torch.Tensor, g: torch.Tensor, extra: Any) -> torch.Tensor:
        if name == "bias":
            return g.flatten(2).sum(2)
        return torch.bmm(g.flatten(2), self.inputs(x)).reshape(g.shape[0], *self.weight.shape)


class Embedding(Layer):
    """``y = W[i]``: the input is one-hot, so its Gram matrix is the diagonal of relative frequencies."""

    linear = True
    one_hot = True

    def leading(self, x: torch.Tensor) -> tuple[int, ...] | None:
        return tuple(x.shape)

    def in_size(self) -> int:
        return int(self.weight.shape[0])

    def out_size(self) -> int:
        return int(self.weight.shape[1])

    def gradient(self, name: str, x: torch.Tensor, g: torch.Tensor, extra: Any) -> torch.Tensor:
        count, rows = x.shape[0], self.weight.shape[0]
        index, values = self._sums(x, g)
        return g.new_zeros(count * rows, g.shape[-1]).index_add_(0, index, values).view(count, rows, -1)

    def squares(self, x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The squared gradients of all examples, as rows of the weight and their values; a row may come repeatedly."""
        index, values = self._sums(x, g)
        return index % self.weight.shape[0], values.square()

    def _sums(self, x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of `g` over each (example, row of the weight) that occurs; O(tokens) memory."""
        count = x.shape[0]
        flat = (x.reshape(count, -1) + self.weight.shape[0] * torch.arange(count, device=x.device)[:, None]).reshape(-1)
        g = g.reshape(-1, g.shape[-1])
        padding: Any = self.module.padding_idx
        if padding is not None:  # autograd gives the padding row no gradient
            real = x.reshape(-1) != padding
            flat, g = flat[real], g[real]
        index, place = torch.unique(flat, return_inverse=True)
        return index, g.new_zeros(len(index), g.shape[-1]).index_add_(0, place, g)


class LayerNorm(Layer):
    """``y = w * z + b`` with the normalised input ``z``; gradients are sums over the tokens of ``g z`` and ``g``."""

    def gradient(self, name: str, x: torch.Tensor, g: torch.Tensor, extra: Any) -> torch.Tensor:
        if name == "bias":
            return _tokens(g).sum(1)
        module: Any = self.module
        normal = torch.nn.functional.layer_norm(x, module.normalized_shape, None, None, module.eps)
        return _tokens(g * normal).sum(1)


class Other(Layer):
    """Any module of one tensor to one tensor that keeps examples apart: its vector-Jacobian product, mapped over them.

    Complexity: that of the module's own backward pass.
    """

    def __init__(self, path: str, module: torch.nn.Module, parameters: dict[str, str]) -> None:
        super().__init__(path, module)
        self.parameters = parameters

    def gradient(self, name: str, x: torch.Tensor, g: torch.Tensor, extra: Any) -> torch.Tensor:
        args, kwargs = extra
        primal = {name: self.module.get_parameter(name).detach()}

        def one(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
            def call(parameters: dict[str, torch.Tensor]) -> Any:
                return torch.func.functional_call(self.module, parameters, (x.unsqueeze(0), *args), kwargs)

            pull: Any = torch.func.vjp(call, primal)[1]
            gradient: torch.Tensor = pull(g.unsqueeze(0))[0][name]
            return gradient

        result: torch.Tensor = torch.func.vmap(one)(x, g)
        return result


def layer_of(path: str, module: torch.nn.Module) -> Layer | None:
    """The layer of a module whose form is known, else None."""
    nn = torch.nn
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return None
    if isinstance(module, nn.Linear):
        return Linear(path, module)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and weight.dim() == 2:
        return Conv1D(path, module)
    if isinstance(module, nn.Conv2d):
        plain = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return Conv2d(path, module) if plain else None
    if isinstance(module, nn.Embedding):
        return None if module.scale_grad_by_freq or module.max_norm is not None else Embedding(path, module)
    if isinstance(module, nn.LayerNorm):
        return LayerNorm(path, module) if len(module.normalized_shape) == 1 else None
    return None
