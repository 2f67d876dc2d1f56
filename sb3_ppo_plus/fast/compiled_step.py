"""The gradient step as one compiled graph: gather, forward, loss, backward, clipping and update of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.func import grad_and_value

from sb3_ppo_plus.distributed.random_streams import RandomStream
from sb3_ppo_plus.fast.captured import Graph
from sb3_ppo_plus.fast.flat_updates import UPDATES
from sb3_ppo_plus.fast.functional import call_with, evaluate_minibatch
from sb3_ppo_plus.fast.graphs import MAX_COMPILATIONS, CompilationReporter, GraphCache
from sb3_ppo_plus.fast.policy_changes import layout_of
from sb3_ppo_plus.fast.replayed_step import ReplayedGradientStep
from sb3_ppo_plus.rollout_batch import Minibatch, RolloutBatch
from sb3_ppo_plus.torch_private import has_gradient_hooks
from sb3_ppo_plus.trees import TreeSpec, tree_flatten, tree_map, tree_unflatten
from sb3_ppo_plus.update.flat_parameters import FlatGroup, FlatParameters
from sb3_ppo_plus.update.gradient_step import AnyMinibatch, Objective
from sb3_ppo_plus.update.losses import METRICS, LossCoefficients
from sb3_ppo_plus.update.parted_gradients import packed, packed_size, unpacked
from sb3_ppo_plus.update.parted_rollout import PartedMinibatch
from sb3_ppo_plus.update.tensor_places import tensor_places, tensors_of

Tensors = dict[str, Any]
# Marks the vector of a part whose gradient a graph has computed. Those of eager ones have a 1
COMPILED = 2


class _GraphInputs(NamedTuple):
    """What all minibatches of one update share.

    :param rollout: the rollout that the minibatches come from
    :param leaves: the graph's inputs except the indices
    :param spec: puts the leaves together again
    :param static_key: what ``number_of`` gives for all constants of the graph
    """

    rollout: RolloutBatch
    leaves: list[th.Tensor]
    spec: TreeSpec
    static_key: int


class CompiledGradientStep(ReplayedGradientStep):
    """Takes the steps in compiled graphs, one for each size of minibatch; equal to eager steps to float32 rounding.

    The first step of a model is eager, because it shows which parameters have a gradient. If a graph cannot be
    compiled, one warning says why, and every step is one of :class:`ReplayedGradientStep`.

    :param policy: the policy; its ``optimizer`` takes the steps
    :param grad_scaler: scales the loss and unscales the gradients under float16, which is not compiled
    :param options: options of TorchInductor
    :param reporter: told what was compiled, or why it could not be
    """

    def __init__(
        self,
        policy: ActorCriticPolicy,
        grad_scaler: th.amp.GradScaler,
        options: dict[str, Any],
        reporter: CompilationReporter,
    ) -> None:
        super().__init__(policy, grad_scaler)
        self._reporter = reporter
        # A step calls dozens of kernels and takes a fifth less time from C++ (measured). An actor calls few
        self._graphs = GraphCache(policy, {"cpp_wrapper": policy.device.type == "cpu", **options}, reporter)
        self._has_hooks = False
        self._compiled_settings: set[str] = set()
        self._shared: _GraphInputs | None = None
        self._all_have_graphs: dict[int, bool] = {}

    @property
    def n_compilations(self) -> int:
        """How many graphs were compiled."""
        return self._graphs.n_compilations

    def begin_update(self) -> None:
        """Notice what has changed since the last update."""
        super().begin_update()
        if self._obstacle_to_flat is not None:
            self._reporter.failed("the gradient step", self._obstacle_to_flat)
        self._has_hooks = has_gradient_hooks(self._parameters)
        if self._has_hooks:
            self._reporter.failed("the gradient step", "a parameter has a hook, which a graph would not call")
        self._graphs.refresh()

    def _reason_against_flat(self) -> None:
        # Compiled steps need flat parameters, and never have SB3's bits
        return None

    def end_update(self) -> None:
        """Leave the policy and its optimiser as separate steps would have left them, and release the rollout."""
        super().end_update()
        self._shared = None
        self._all_have_graphs = {}

    def __call__(self, objective: Objective, minibatch: AnyMinibatch) -> tuple[th.Tensor, bool]:
        """Take a step, see :meth:`GradientStep.__call__`."""
        flat = self._flat
        if flat is None or not flat.has_state:
            return super().__call__(objective, minibatch)
        if isinstance(minibatch, PartedMinibatch):
            return self._step_on_parts(objective, minibatch, flat)
        shared = self._shared_inputs(objective, minibatch)
        graph = None
        if shared is not None and minibatch.indices is not None:
            graph = self._graph("the gradient step", _StepFunction.__call__, objective, minibatch.indices, shared)
        if graph is None or shared is None or minibatch.indices is None:
            return super().__call__(objective, minibatch)
        metrics: th.Tensor = graph(minibatch.indices, *shared.leaves)[0]
        return self._after(metrics, objective, flat)

    def _after(self, metrics: th.Tensor, objective: Objective, flat: FlatParameters) -> tuple[th.Tensor, bool]:
        """Return what :meth:`__call__` returns after a graph's step."""
        if objective.forbids_step(metrics[METRICS.index("approx_kl")]):
            return metrics, False
        if not flat.has_stepped:
            flat.show_gradients()
        return metrics, True

    def _shared_inputs(self, objective: Objective, minibatch: Minibatch) -> _GraphInputs | None:
        """Return what the graphs of all minibatches share; None: there are no graphs."""
        if minibatch.indices is None:
            self._reporter.failed("the gradient step", "the rollout buffer is not one of PPOPlus's")
        if minibatch.indices is None or self._has_hooks:
            return None
        shared = self._shared
        is_new = shared is None or shared.rollout is not minibatch.rollout
        if is_new and len(self._compiled_settings) <= MAX_COMPILATIONS:
            self._compiled_settings.add(self._settings())
        if len(self._compiled_settings) > MAX_COMPILATIONS:
            self._reporter.failed("the gradient step", "settings of the optimizer change again and again")
            return None
        if shared is None or is_new:
            shared = self._shared = self._graph_inputs(objective, minibatch.rollout)
        return shared

    def _step_on_parts(
        self, objective: Objective, minibatch: PartedMinibatch, flat: FlatParameters
    ) -> tuple[th.Tensor, bool]:
        """Take a step by two graphs: one differentiates a part, the other steps on the sum over all parts.

        A process may be without graphs, where there is no compiler. Its eager step adds a vector of the same kind. Then
        all step eagerly, so that they have the same bits.
        """
        shared = self._shared_inputs(objective, minibatch.parts[0])
        if shared is None:
            return super().__call__(objective, minibatch)
        indices = [part.indices for part in minibatch.parts if part.indices is not None]
        of_part = self._graph("the gradient of a part", _StepFunction.differentiate, objective, indices[0], shared)
        like_total = indices[0].new_empty(packed_size(self._parameters), dtype=th.float32)
        step = self._graph("the step on all parts", _StepFunction.step, objective, like_total, shared)
        if of_part is None or step is None:
            return super().__call__(objective, minibatch)
        owner = minibatch.owner
        pairs = zip(indices, owner.streams(), strict=True)
        total = owner.sum(_in_stream(stream, of_part, [each, *shared.leaves]) for each, stream in pairs)
        if len(indices[0]) not in self._all_have_graphs:
            marks = unpacked(total, self._parameters)[1].max()
            self._all_have_graphs[len(indices[0])] = marks.item() == COMPILED * owner.n_in_all
        if not self._all_have_graphs[len(indices[0])]:
            metrics, _, gradients = unpacked(total, self._parameters)
            pairs_of_flags = zip(gradients, flat.has_gradient, strict=True)
            of_flat = [gradient if has else None for gradient, has in pairs_of_flags]
            return self._flat_step_along(metrics, of_flat, objective)
        return self._after(step(total, *shared.leaves)[0], objective, flat)

    def _graph(
        self,
        what: str,
        method: Callable[..., th.Tensor],
        objective: Objective,
        first: th.Tensor,
        shared: _GraphInputs,
    ) -> Graph | None:
        """Return the graph of a method of :class:`_StepFunction`; None: there is none."""
        key = (method.__name__, len(first), shared.static_key)
        spec = shared.spec
        return self._graphs.get(
            key, what, lambda: self._graph_function(method, objective, spec), [first, *shared.leaves]
        )

    def _graph_inputs(self, objective: Objective, rollout: RolloutBatch) -> _GraphInputs:
        assert self._flat is not None
        self._flat.keep_steps_with_parameters()
        leaves, spec = tree_flatten(self._inputs(objective, rollout))
        constants = (*self._static_key(objective), spec, layout_of(leaves))
        return _GraphInputs(rollout, leaves, spec, self._graphs.number_of(constants))

    def _inputs(self, objective: Objective, rollout: RolloutBatch) -> Tensors:
        """Collect everything that the graph reads or changes, except the indices."""
        assert self._flat is not None
        coefficients = objective.coefficients
        scalars = {
            **{name: value for name, value in coefficients._asdict().items() if value is not None},
            "max_grad_norm": objective.max_grad_norm,
            "kl_limit": objective.kl_limit if objective.kl_limit is not None else 0.0,
        }
        rates = [group.settings["lr"] for group in self._flat.groups]
        # Schedules change these values. So they are inputs, because a graph's constants stay
        values = th.tensor([*scalars.values(), *rates], dtype=th.float32, device=rollout.old_values.device)
        flat_ids = {id(parameter) for group in self._flat.groups for parameter in group.parameters}
        return {
            "scalars": dict(zip([*scalars, *map(str, range(len(rates)))], values.unbind(), strict=True)),
            "flat": [group.flat.detach() for group in self._flat.groups],
            "gradients": [group.flat.grad for group in self._flat.groups],
            "state": [tensors_of(group.state) for group in self._flat.groups],
            # Buffers, and parameters that are frozen or have no gradient
            "fixed": {
                name: tensor.detach()
                for name, tensor in tensor_places(self.policy).items()
                if id(tensor) not in flat_ids
            },
            "rollout": tensors_of(rollout.by_field()),
        }

    def _settings(self) -> str:
        assert self._flat is not None
        return str([_constants_of(group) for group in self._flat.groups])

    def _static_key(self, objective: Objective) -> tuple[Any, ...]:
        """Return everything that a graph holds as constants, except the layout of its inputs."""
        assert self._flat is not None
        names = {id(tensor): name for name, tensor in tensor_places(self.policy).items()}
        return (
            objective.normalize_advantage,
            objective.pessimistic_value_clip,
            objective.symmetry_mode,
            objective.symmetry_coef,
            objective.smoothness,
            objective.coefficients.clip_range_vf is None,
            objective.kl_limit is None,
            objective.amp_dtype,
            type(self.policy.optimizer),
            self._settings(),
            tuple(tuple(names[id(parameter)] for parameter in group.parameters) for group in self._flat.groups),
        )

    def _graph_function(
        self, method: Callable[..., th.Tensor], objective: Objective, spec: TreeSpec
    ) -> Callable[..., tuple[th.Tensor]]:
        assert self._flat is not None
        step = _StepFunction(self.policy, objective, self._flat.groups)

        def function(first: th.Tensor, *leaves: th.Tensor) -> tuple[th.Tensor]:
            return (method(step, first, tree_unflatten(leaves, spec)),)

        return function


def _in_stream(stream: RandomStream, graph: Graph, inputs: list[th.Tensor]) -> th.Tensor:
    with stream:
        computed: th.Tensor = graph(*inputs)[0]
    return computed


def _constants_of(group: FlatGroup) -> dict[str, Any]:
    """Return the settings that a graph holds as constants.

    Tensors become numbers, because a tensor's text has only a few digits.
    """
    constants = {name: value for name, value in group.settings.items() if name != "lr"}
    as_numbers: dict[str, Any] = tree_map(lambda v: v.tolist() if isinstance(v, th.Tensor) else v, constants)
    return as_numbers


class _StepFunction:
    """The eager step as a function of the tensors of :meth:`CompiledGradientStep._inputs`, which is then traced."""

    def __init__(self, policy: ActorCriticPolicy, objective: Objective, groups: list[FlatGroup]) -> None:
        self._policy = policy
        self._objective = objective
        self._groups = groups
        self._places = {name: id(tensor) for name, tensor in tensor_places(policy).items()}

    def __call__(self, indices: th.Tensor, inputs: Tensors) -> th.Tensor:
        """Step on a whole minibatch; return its metrics."""
        return self._step_on(*self._differentiate(indices, inputs), inputs)

    def differentiate(self, indices: th.Tensor, inputs: Tensors) -> th.Tensor:
        """Return what :func:`packed` makes of metrics and gradient of a part of a minibatch."""
        metrics, gradient = self._differentiate(indices, inputs)
        views = {
            id(parameter): view
            for group, flat_tensor in zip(self._groups, gradient, strict=True)
            for parameter, view in zip(group.parameters, group.views(flat_tensor), strict=True)
        }
        parameters = list(self._policy.parameters())
        return packed(metrics, parameters, [views.get(id(parameter)) for parameter in parameters], COMPILED)

    def step(self, total: th.Tensor, inputs: Tensors) -> th.Tensor:
        """Step on the sum of what :meth:`differentiate` has returned; return the metrics of the minibatch."""
        parameters = list(self._policy.parameters())
        metrics, _, gradients = unpacked(total, parameters)
        by_id = {id(parameter): gradient for parameter, gradient in zip(parameters, gradients, strict=True)}
        # Only the groups' parameters have a gradient
        flat = [group.joined([by_id[id(parameter)] for parameter in group.parameters]) for group in self._groups]
        return self._step_on(metrics, flat, inputs)

    def _differentiate(self, indices: th.Tensor, inputs: Tensors) -> tuple[th.Tensor, list[th.Tensor]]:
        objective, scalars, fixed = self._objective, inputs["scalars"], inputs["fixed"]
        batch = RolloutBatch(**inputs["rollout"]).select(indices)
        coefficients = LossCoefficients(
            scalars["clip_range"],
            scalars.get("clip_range_vf"),
            scalars["ent_coef"],
            scalars["vf_coef"],
            scalars.get("caps_temporal"),
            scalars.get("caps_spatial"),
        )

        def loss(flat: list[th.Tensor]) -> tuple[th.Tensor, th.Tensor]:
            views = {
                id(parameter): view
                for group, flat_tensor in zip(self._groups, flat, strict=True)
                for parameter, view in zip(group.parameters, group.views(flat_tensor), strict=True)
            }
            tensors = {name: views[place] if place in views else fixed[name] for name, place in self._places.items()}
            evaluation = call_with(tensors, evaluate_minibatch, self._policy, objective, batch)
            terms = objective.loss(batch, evaluation, coefficients)
            return terms.loss, th.stack([term.detach() for term in terms])

        gradient, (_, metrics) = grad_and_value(loss, has_aux=True)(inputs["flat"])
        return metrics, gradient

    def _step_on(self, metrics: th.Tensor, gradient: Sequence[th.Tensor], inputs: Tensors) -> th.Tensor:
        objective, scalars = self._objective, inputs["scalars"]
        grad_norm = th.stack([each.square().sum() for each in gradient]).sum().sqrt()
        scale = (scalars["max_grad_norm"] / (grad_norm + 1e-6)).clamp(max=1.0)
        is_allowed = metrics[METRICS.index("loss")].isfinite() & grad_norm.isfinite()
        within_limit = None
        if objective.kl_limit is not None:
            within_limit = metrics[METRICS.index("approx_kl")] <= scalars["kl_limit"]
            is_allowed = is_allowed & within_limit
        for index, (group, parameters, old, computed, shown) in enumerate(
            zip(self._groups, inputs["flat"], inputs["state"], gradient, inputs["gradients"], strict=True)
        ):
            # Users read the parameters' grad after an update. It is the gradient of the last step
            clipped = computed * scale
            shown.copy_(clipped if within_limit is None else th.where(within_limit, clipped, shown))
            update = UPDATES[type(group.optimizer)]
            new_parameters, new = update(_constants_of(group), parameters, clipped, old, scalars[str(index)])
            for target, value in [(parameters, new_parameters), *((old[name], new[name]) for name in new)]:
                target.copy_(th.where(is_allowed, value, target))
        return th.cat([metrics, grad_norm.reshape(1)])
