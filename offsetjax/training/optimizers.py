"""Optimizers beside AdamW, all of optax: each a function of the section `optimizer`, as `BuildOptimizer` says.

A weight decay is always the learning rate times `optimizer.weight_decay` of the weights themselves, never of the
gradient's average (I. Loshchilov and F. Hutter, arXiv 1711.05101).
"""

from typing import Any

import jax
import optax
from jaxtyping import PyTree
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers

from offsetjax.training.optimizer import Mask, Optimizer
from offsetjax.training.schedules import learning_rate

_MUON_MOMENTUM, _MUON_RMS = 0.95, 0.2


def lion(settings: ConfigDict, num_steps: int, decays: Mask) -> Optimizer:
    """Lion (X. Chen et al., arXiv 2302.06675): one moment, and updates that are signs."""
    rate = learning_rate(settings, num_steps)
    transform = optax.lion(
        rate,
        b1=settings.b1,
        b2=settings.b2,
        mu_dtype=settings.moment_dtype,
        weight_decay=settings.weight_decay,
        mask=decays,
    )
    return Optimizer(transform, rate)


def adafactor(settings: ConfigDict, num_steps: int, decays: Mask) -> Optimizer:
    """Adafactor (N. Shazeer and M. Stern, arXiv 1804.04235) at the rate that is given, and not at one of its own.

    A matrix of 128 rows and columns or more has second moments of its rows and of its columns alone. There is no first
    moment.
    """
    rate = learning_rate(settings, num_steps)
    transform = optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(settings.weight_decay, decays),
        optax.scale_by_learning_rate(rate),
    )
    return Optimizer(transform, rate)


def sgd(settings: ConfigDict, num_steps: int, decays: Mask) -> Optimizer:
    """Stochastic gradient descent with a momentum of `optimizer.b1`, of gradients that are not averaged but added."""
    rate = learning_rate(settings, num_steps)
    transform = optax.chain(
        optax.trace(settings.b1, accumulator_dtype=settings.moment_dtype) if settings.b1 else optax.identity(),
        optax.add_decayed_weights(settings.weight_decay, decays),
        optax.scale_by_learning_rate(rate),
    )
    return Optimizer(transform, rate)


def muon(settings: ConfigDict, num_steps: int, decays: Mask) -> Optimizer:
    """Muon (K. Jordan, 2024) for the kernels of layers and convolutions and for adapters, AdamW for all else.

    Its momentum is 0.95; `b1`, `b2` and `eps` are AdamW's. An update is scaled to the size that AdamW's has, so that
    its learning rates hold (J. Liu et al., arXiv 2502.16982).
    """
    rate = learning_rate(settings, num_steps)
    transform = optax.contrib.muon(
        rate,
        beta=_MUON_MOMENTUM,
        eps=settings.eps,
        mu_dtype=settings.moment_dtype,
        weight_decay=settings.weight_decay,
        adam_b1=settings.b1,
        adam_b2=settings.b2,
        adam_weight_decay=settings.weight_decay,
        muon_weight_dimension_numbers=_matrices,
        consistent_rms=_MUON_RMS,
    )
    return Optimizer(_only(transform, decays), rate)


def prodigy(settings: ConfigDict, num_steps: int, decays: Mask) -> Optimizer:
    """Prodigy (K. Mishchenko and A. Defazio, arXiv 2306.06101), which finds its rate; the given one multiplies it."""
    rate = learning_rate(settings, num_steps)
    transform = optax.contrib.prodigy(
        rate, betas=(settings.b1, settings.b2), eps=settings.eps, weight_decay=settings.weight_decay
    )
    return Optimizer(_only(transform, decays), rate)


def dadapt_adamw(settings: ConfigDict, num_steps: int, decays: Mask) -> Optimizer:
    """D-Adaptation of AdamW (A. Defazio and K. Mishchenko, arXiv 2301.07733); the given rate multiplies its own."""
    rate = learning_rate(settings, num_steps)
    transform = optax.contrib.dadapt_adamw(
        rate, betas=(settings.b1, settings.b2), eps=settings.eps, weight_decay=settings.weight_decay
    )
    return Optimizer(_only(transform, decays), rate)


def _only(transform: optax.GradientTransformation, decays: Mask) -> optax.GradientTransformation:
    """A transformation of what may decay; the rest, whose gradient is 0, stays as it is."""
    return optax.masked(transform, decays)


def _matrices(params: PyTree) -> PyTree:
    """Which arrays of a network map inputs to outputs, and along which axes; None: none of them."""

    def numbers(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
        if path[-1].key not in ("kernel", "down", "up") or leaf.ndim < 2:
            return None
        return MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(numbers, params)
