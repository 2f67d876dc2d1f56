"""PPO for Stable-Baselines3 users: SB3's PPO bit for bit by default, with every extra one argument away."""

from sb3_ppo_plus.buffers import PPOPlusDictRolloutBuffer, PPOPlusRolloutBuffer
from sb3_ppo_plus.env_states.resumable_env import ResumableEnv
from sb3_ppo_plus.envs.fill_missing_keys import FillMissingKeys
from sb3_ppo_plus.envs.restarting_env import RestartingEnv
from sb3_ppo_plus.errors import (
    CheckpointError,
    DeadWorkerError,
    HangingWorkerError,
    NonFiniteError,
    RankFailedError,
    ResumeProofError,
    UntrustedFileError,
    WrapperStackError,
)
from sb3_ppo_plus.export.exporting import export_policy
from sb3_ppo_plus.extractors import ImpalaCNN, MultiInputExtractor, TransformerExtractor
from sb3_ppo_plus.policies import (
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
from sb3_ppo_plus.ppo_plus import PPOPlus
from sb3_ppo_plus.resuming.checkpoint import TrainingCheckpoint
from sb3_ppo_plus.resuming.resume import best_checkpoint, latest_checkpoint
from sb3_ppo_plus.rollout_batch import RolloutBatch
from sb3_ppo_plus.saving.vec_normalize import load_vec_normalize, save_vec_normalize
from sb3_ppo_plus.schedules import Constant, Cosine, Exponential, Linear, WarmupCosine, make_schedule

__version__ = "0.2.0"

__all__ = [
    "ActorCriticPlusCnnPolicy",
    "ActorCriticPlusPolicy",
    "CheckpointError",
    "CnnLstmPolicy",
    "CnnPolicy",
    "Constant",
    "Cosine",
    "DeadWorkerError",
    "Exponential",
    "FillMissingKeys",
    "HangingWorkerError",
    "ImpalaCNN",
    "Linear",
    "MlpLstmPolicy",
    "MlpPolicy",
    "MultiInputActorCriticPlusPolicy",
    "MultiInputExtractor",
    "MultiInputLstmPolicy",
    "MultiInputPolicy",
    "NonFiniteError",
    "PPOPlus",
    "PPOPlusDictRolloutBuffer",
    "PPOPlusRolloutBuffer",
    "RankFailedError",
    "RestartingEnv",
    "ResumableEnv",
    "ResumeProofError",
    "RolloutBatch",
    "TrainingCheckpoint",
    "TransformerExtractor",
    "UntrustedFileError",
    "WarmupCosine",
    "WrapperStackError",
    "best_checkpoint",
    "export_policy",
    "latest_checkpoint",
    "load_vec_normalize",
    "make_schedule",
    "save_vec_normalize",
]
