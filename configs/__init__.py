"""Configuration files and their one loader: every key is known, every error is one line."""

if __name__ != "polyfuse.configs":
    raise ImportError(f"import polyfuse.configs, not {__name__}")

from polyfuse.configs._environment import check_variables, did_you_mean, flag, shadow
from polyfuse.configs._load import (
    EncoderConfig,
    Level,
    ModelCase,
    ModelConfig,
    UserConfig,
    encoder_config,
    level,
    model_configs,
    platform_order,
    projection_strategies,
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
    "level",
    "model_configs",
    "platform_order",
    "projection_strategies",
    "shadow",
    "user_config",
]
