"""At what sizes the kernels are tested: those of the released models."""

import torch

#: width and heads of the blocks
MODELS = {"infinity-2b": (2048, 16), "infinity-8b": (3584, 28)}
CASES = (
    ("infinity-2b", torch.float32),
    ("infinity-2b", torch.float16),
    ("infinity-2b", torch.bfloat16),
    ("infinity-8b", torch.bfloat16),
)
#: Channels of the decoder of Infinity-2B and 8B, precision, batch and side of a map.
DECODER_CASES = (
    (128, torch.float32, 2, 60),
    (128, torch.bfloat16, 1, 60),
    (256, torch.bfloat16, 2, 40),
    (512, torch.float16, 1, 40),
)
#: Differences are counted in the rounding of the value, below this in that of this. Results in float32 carry the rounding
#: of terms around 1 that may cancel; those of 16 bits hide it.
LEAST = {torch.float32: 1.0, torch.float16: 2**-6, torch.bfloat16: 2**-6}
#: Entries of the KV cache before the last scale of a 1024 px image.
OFFSET = 6425


class Numbers:
    """Normal numbers, the same at every run."""

    def __init__(self):
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator).to(dtype)
