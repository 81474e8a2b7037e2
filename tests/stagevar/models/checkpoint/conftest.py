"""A tiny transformer of Infinity, and its weights as a state dict."""

import pytest
import torch

from stagevar.models.checkpoint import random_weights
from stagevar.models.infinity.config import InfinityConfig
from stagevar.models.infinity.transformer import Infinity

TINY = InfinityConfig(depth=2, width=64, heads=2, chunks=2, token_bits=4, text_dim=128, text_maxlen=8)


def on_meta(config: InfinityConfig = TINY) -> Infinity:
    with torch.device("meta"):
        return Infinity(config)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    model = on_meta()
    random_weights.randomize(model, seed=1)
    return {key: value.clone() for key, value in model.state_dict().items()}
