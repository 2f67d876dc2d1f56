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
