"""``distributed="exact"``: K processes with N / K environments each equal one with N and ``micro_batches=K``."""

import pytest
from environments import record_logs
from parted_cases import CASES, N_ENVS, N_STEPS
from rank_runs import results_of
from resume_cases import without_timings
from stable_baselines3.common.vec_env import unwrap_vec_normalize
from states import assert_same_bits, state_of

UPDATE = N_ENVS * N_STEPS
N_UPDATES = 5


def trained(case, n_envs, **arguments):
    model = case.make_model(n_envs, **arguments)
    recorder = record_logs(model)
    model.learn(N_UPDATES * UPDATE)
    normalizer = unwrap_vec_normalize(model.env)
    return {
        "state": state_of(model),
        "logs": [without_timings(log) for log in [*recorder.dumps, dict(model.logger.name_to_value)]],
        "episodes": [(episode["r"], episode["l"]) for episode in model.ep_info_buffer],
        "statistics": normalizer and [str(vars(each)) for each in (normalizer.ret_rms,)],
        "actions": model.rollout_buffer.actions,
    }


#: The other cases take longer
OFTEN = ("mlp", "cnn", "masks", "padded gru", "vec_normalize", "gsde", "target_kl")


@pytest.mark.parametrize("n_ranks", [2, pytest.param(4, marks=pytest.mark.heavy)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.heavy) for name in CASES]
)
def test_processes_equal_one(name, n_ranks):
    case = CASES[name]
    whole = trained(case, N_ENVS, micro_batches=n_ranks)
    ranks = results_of(n_ranks, lambda rank: trained(case, N_ENVS // n_ranks, distributed="exact"))
    for rank, result in enumerate(ranks):
        envs = slice(rank * N_ENVS // n_ranks, (rank + 1) * N_ENVS // n_ranks)
        assert_same_bits(result, {**whole, "actions": whole["actions"][:, envs]})
