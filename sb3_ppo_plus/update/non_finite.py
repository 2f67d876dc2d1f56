"""What happens when the loss or its gradient is not finite."""

from __future__ import annotations

import math

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_ppo_plus.attributes import PlusModel
from sb3_ppo_plus.distributed.ranks import of_all_processes
from sb3_ppo_plus.errors import NonFiniteError
from sb3_ppo_plus.extractors import TransformerExtractor
from sb3_ppo_plus.update.history import UpdateHistory
from sb3_ppo_plus.update.losses import METRICS

TERMS = {
    **{"policy_loss": "policy loss", "value_loss": "value loss", "entropy_loss": "entropy"},
    **{"caps_temporal": "temporal term of CAPS", "caps_spatial": "spatial term of CAPS"},
}


def check_epsilon(policy: ActorCriticPolicy) -> None:
    """Refuse an optimiser that would divide 0 by 0 in a Transformer.

    A key bias adds one number to all logits of a softmax, which changes nothing. Its gradient is 0 apart from rounding,
    and whether it is exactly 0 differs from seed to seed, and between compiled and eager updates.

    :param policy: the policy
    :raises ValueError: for eps=0 with a Transformer as features extractor
    """
    has_transformer = any(isinstance(module, TransformerExtractor) for module in policy.modules())
    if has_transformer and any(group.get("eps") == 0 for group in policy.optimizer.param_groups):
        raise ValueError(
            f"eps must be positive with the Transformer, got optimizer_kwargs={{'eps': 0}}: "
            f"{type(policy.optimizer).__name__} divides by the size of a gradient plus eps, and some gradients of the "
            "Transformer are 0; allowed: for example 1e-8"
        )


def count_skipped_steps(history: UpdateHistory, model: PlusModel, *, checks_gradient: bool) -> None:
    """Find the minibatches of an update whose loss or gradient was not finite, so that no step was taken.

    The model counts them, and with ``on_non_finite="skip"`` its log too.

    :param history: the history of the update; its ``is_fine`` is set
    :param model: the model; its ``on_non_finite`` and ``max_skipped`` say how many such steps are allowed in a row
    :param checks_gradient: whether the gradient counts too; False: a gradient scaler deals with its overflow
    :raises NonFiniteError: if more are skipped in a row; the message names the term, epoch and minibatch
    """
    # If the limit of approx_kl stopped the update, no step was due on the last minibatch
    table = history.table[: len(history.table) - history.was_stopped]
    columns = [METRICS.index(name) for name in ("loss", "grad_norm")[: 1 + checks_gradient]]
    is_fine = table[:, columns].isfinite().all(dim=1)
    total, in_a_row = model._skipped_steps, 0
    if not is_fine.all():
        total, in_a_row = _count(is_fine, history, model)
        history.is_fine = th.cat([is_fine, th.ones(int(history.was_stopped), dtype=th.bool)])
    model._skipped_steps, model._skipped_in_a_row = total, in_a_row
    if model.on_non_finite == "skip":
        model.logger.record("train/skipped_steps", total)


def _count(is_fine: th.Tensor, history: UpdateHistory, model: PlusModel) -> tuple[int, int]:
    """Return how many steps training has skipped so far, and how many in a row up to now."""
    total, in_a_row = model._skipped_steps, model._skipped_in_a_row
    max_in_a_row = 0 if model.on_non_finite == "raise" else model.max_skipped
    for index, was_stepped_on in enumerate(is_fine.tolist()):
        in_a_row = 0 if was_stepped_on else in_a_row + 1
        total += not was_stepped_on
        if in_a_row > max_in_a_row:
            # The table is that of all processes
            message = _message(history.table[index].tolist(), history.place_of(index), in_a_row, model)
            raise of_all_processes(NonFiniteError(message))
    return total, in_a_row


def _message(metrics: list[float], place: tuple[int, int], in_a_row: int, model: PlusModel) -> str:
    values = dict(zip(METRICS, metrics, strict=True))
    terms = [f"the {text} is {values[name]}" for name, text in TERMS.items() if not math.isfinite(values[name])]
    terms = terms or [f"the norm of the gradient is {values['grad_norm']}, of the loss {values['loss']}"]
    where = f"epoch {place[0]}, minibatch {place[1]}"
    if model.on_non_finite == "skip":
        where += f", {in_a_row} in a row, and max_skipped={model.max_skipped}"
    when = f"update {model._n_iterations + 1}, {model.num_timesteps} timesteps; no step was taken on it"
    # It may be about to be written
    model._current_run.wait_for_checkpoints()
    if model.last_checkpoint is not None:
        when += f"; the last checkpoint is {model.last_checkpoint}"
    return f"{' and '.join(terms)} in {where}, {when}"
