"""STAR: transformer and text encoder, on the tokenizer of `stagevar.models.vq`."""
