"""Hooks of callbacks that SB3 lacks: at the end of an update, and at the end of ``learn`` even after an exception."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EventCallback


def iterate_callbacks(callback: BaseCallback) -> Iterator[BaseCallback]:
    """Yield a callback and every callback inside it, in SB3's lists and event callbacks.

    :param callback: the callback
    """
    yield callback
    children = callback.callbacks if isinstance(callback, CallbackList) else []
    if isinstance(callback, EventCallback):
        nested = (callback.callback, getattr(callback, "callback_on_new_best", None))
        children = [child for child in nested if child is not None]
    for child in children:
        yield from iterate_callbacks(child)


def notify_update_end(callback: BaseCallback | None) -> bool:
    """Call ``on_update_end() -> bool`` of every callback that has it.

    :param callback: the callback of ``learn``, with others inside; None outside of ``learn``
    :return: False if one of them returned False, which stops training
    """
    if callback is None:
        return True
    children = [child for child in iterate_callbacks(callback) if hasattr(child, "on_update_end")]
    # Checkpoints come last, because they hold what the other callbacks have done; after them, what reports them
    children.sort(key=lambda child: int(getattr(child, "comes_last", False)))
    answers = [child.on_update_end() for child in children]
    return all(answer is not False for answer in answers)


def notify_learn_end(callback: BaseCallback, afterwards: Callable[[], None]) -> None:
    """Call ``on_learn_end()`` of every callback that has it, in reverse order, also if one of them fails.

    :param callback: the callback of ``learn``, with others inside
    :param afterwards: what to do last
    """
    with ExitStack() as stack:
        # The last one that is entered is called first
        stack.callback(afterwards)
        for child in iterate_callbacks(callback):
            if hasattr(child, "on_learn_end"):
                stack.callback(child.on_learn_end)
