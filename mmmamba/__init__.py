"""mmMamba: vision-language models whose memory and speed do not depend on the length of the conversation."""

from mmmamba.checkpoint import CheckpointError, load_model, save_model
from mmmamba.config import ConfigError, ModelConfig
from mmmamba.generate import (
    ModelInputs,
    SamplingParams,
    StreamEvent,
    decode_one_token,
    prefill,
    sample,
    stream,
)
from mmmamba.model import MMMamba
from mmmamba.state import DecodeState

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DecodeState",
    "MMMamba",
    "ModelConfig",
    "ModelInputs",
    "SamplingParams",
    "StreamEvent",
    "decode_one_token",
    "load_model",
    "prefill",
    "sample",
    "save_model",
    "stream",
]
