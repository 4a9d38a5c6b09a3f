"""Running statistics of batch normalisation, estimated again for merged weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from merganser._torch import torch
from merganser.errors import InputError
from merganser.statistics._batch import Batch

__all__ = ["update_batch_norm"]


def update_batch_norm(model: torch.nn.Module, batches: Iterable[Any]) -> int:
    """Replace the running mean and variance of every batch normalisation by those of the batches, in place.

    Averaging models leaves running statistics that do not belong to the averaged weights (Izmailov et al., Averaging
    weights leads to wider optima, 2018, arXiv:1803.05407; also the step before every evaluation of sparse model soups,
    arXiv:2306.16788). The statistics are reset; then the model sees every batch once, with its batch normalisations in
    training mode (each normalises by its batch) and everything else, dropout included, in evaluation mode. The result
    is the mean over the batches of their means and unbiased variances, each batch with the same weight. Modes and
    momenta are as before afterwards.

    Args:
        model: a module; nothing else of it changes.
        batches: as for `collect`: mappings of the model's keyword arguments (labels are not used), tensors, or pairs of
            input and labels. Several examples each.

    Returns:
        The number of batches; 0, and no batch is read, if the model keeps no such statistics.

    Raises:
        InputError: E0417, there is no batch; E0415, one is none of these.
    """
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    norms = [m for m in norms if m.running_mean is not None]
    if not norms:
        return 0
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(norm, norm.momentum) for norm in norms]
    before = [{name: value.clone() for name, value in norm.named_buffers(recurse=False)} for norm in norms]
    count = 0
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        with torch.no_grad():
            for count, given in enumerate(batches, 1):
                batch = Batch.of(given, device, number=count - 1)
                model(*batch.args, **batch.kwargs)
        if not count:
            raise InputError("E0417", "there is no batch to estimate statistics from")
    except BaseException:
        for norm, values in zip(norms, before, strict=True):
            for name, buffer in norm.named_buffers(recurse=False):
                buffer.copy_(values[name])
        raise
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
    return count
