"""What happens at numbers that are not finite: in what the environments return, and in the loss and its gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch as th

from sb3_ppo_plus.errors import NonFiniteError
from sb3_ppo_plus.extractors import TransformerExtractor
from sb3_ppo_plus.update.losses import METRICS

TERMS = {"policy_loss": "policy loss", "value_loss": "value loss", "entropy_loss": "entropy"}
ON_NON_FINITE = ("raise", "skip")


def check_epsilon(policy: th.nn.Module, optimizer: th.optim.Optimizer) -> None:
    """Refuse an optimiser that would divide 0 by 0 in a Transformer.

    A key bias adds one number to all logits of a softmax, which changes nothing. Its gradient is 0 but for rounding,
    and whether it is exactly 0 differs from seed to seed, and between compiled and eager updates.

    :param policy: whose parameters are stepped
    :param optimizer: the policy's
    :raises ValueError: for eps=0 with a Transformer as features extractor
    """
    has_transformer = any(isinstance(module, TransformerExtractor) for module in policy.modules())
    if has_transformer and any(group.get("eps") == 0 for group in optimizer.param_groups):
        raise ValueError(
            f"eps must be positive with the Transformer, got optimizer_kwargs={{'eps': 0}}: {type(optimizer).__name__} "
            "divides by the size of a gradient plus eps, and some of the Transformer's gradients are 0; allowed: for "
            "example 1e-8"
        )


class Skipped(NamedTuple):
    """Steps that were left out.

    :param total: all so far
    :param in_a_row: without a step in between, up to now
    """

    total: int
    in_a_row: int


def check_steps(
    table: th.Tensor,
    skipped: Skipped,
    max_in_a_row: int | None,
    *,
    checks_gradient: bool,
    n_minibatches: int,
    after: str,
) -> tuple[th.Tensor, Skipped]:
    """Find the minibatches of an update whose loss or gradient was not finite, on which no step was taken.

    :param table: metrics of the minibatches that were to be stepped on, shape (n, len(METRICS))
    :param skipped: steps left out before the update
    :param max_in_a_row: how many of them are allowed in a row; None: none at all
    :param checks_gradient: False: a gradient scaler deals with overflowing gradients
    :param n_minibatches: in an epoch
    :param after: end of the message
    :return: which of the minibatches were fine, bool of shape (n,), and the steps left out by now
    :raises NonFiniteError: says which term, epoch and minibatch
    """
    columns = [METRICS.index(name) for name in ("loss", "grad_norm")[: 1 + checks_gradient]]
    is_fine = table[:, columns].isfinite().all(dim=1)
    total, in_a_row = skipped
    for index in range(0 if is_fine.all() else len(is_fine)):
        in_a_row = 0 if is_fine[index] else in_a_row + 1
        total += in_a_row > 0
        if in_a_row > (0 if max_in_a_row is None else max_in_a_row):
            values = dict(zip(METRICS, table[index].tolist(), strict=True))
            terms = [f"the {text} is {values[name]}" for name, text in TERMS.items() if not math.isfinite(values[name])]
            terms = terms or [f"the norm of the gradient is {values['grad_norm']}, of the loss {values['loss']}"]
            row = "" if max_in_a_row is None else f", the {in_a_row}th in a row, and max_skipped={max_in_a_row}"
            raise NonFiniteError(
                f"{' and '.join(terms)} in epoch {index // n_minibatches}, minibatch {index % n_minibatches}{row}, "
                f"{after}"
            )
    return is_fine, Skipped(total, 0 if is_fine.all() else in_a_row)
