"""Configuration files and their one loader: every key is known, every error is one line."""

if __name__ != "polyfuse.configs":
    raise ImportError(f"import polyfuse.configs, not {__name__}")

from polyfuse.configs._environment import check_variables, did_you_mean, flag, shadow, tuning_is_frozen
from polyfuse.configs._load import (
    EncoderConfig,
    Level,
    ModelCase,
    ModelConfig,
    UserConfig,
    encoder_config,
    launch_entries,
    level,
    model_configs,
    model_names,
    platform_order,
    projection_strategies,
    tuned_ranges,
    tuning_file,
    user_config,
)

__all__ = [
    "EncoderConfig",
    "Level",
    "ModelCase",
    "ModelConfig",
    "UserConfig",
    "check_variables",
    "did_you_mean",
    "encoder_config",
    "flag",
    "launch_entries",
    "level",
    "model_configs",
    "model_names",
    "platform_order",
    "projection_strategies",
    "shadow",
    "tuned_ranges",
    "tuning_file",
    "tuning_is_frozen",
    "user_config",
]
