"""The policies: networks, memories, action distributions, masks."""

from sb3_ppo_plus.policies.actor_critic import (
    ActorCriticPlusCnnPolicy,
    ActorCriticPlusPolicy,
    CnnLstmPolicy,
    CnnPolicy,
    MlpLstmPolicy,
    MlpPolicy,
    MultiInputActorCriticPlusPolicy,
    MultiInputLstmPolicy,
    MultiInputPolicy,
)

__all__ = [
    "ActorCriticPlusCnnPolicy",
    "ActorCriticPlusPolicy",
    "CnnLstmPolicy",
    "CnnPolicy",
    "MlpLstmPolicy",
    "MlpPolicy",
    "MultiInputActorCriticPlusPolicy",
    "MultiInputLstmPolicy",
    "MultiInputPolicy",
]

# A saved model names its policy's class by module: this one, in which every release finds it
for _policy_class in (
    ActorCriticPlusPolicy,
    ActorCriticPlusCnnPolicy,
    MultiInputActorCriticPlusPolicy,
    MlpLstmPolicy,
    CnnLstmPolicy,
    MultiInputLstmPolicy,
):
    _policy_class.__module__ = __name__
