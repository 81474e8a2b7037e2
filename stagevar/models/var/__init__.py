"""VAR: the class-conditional transformer, on the tokenizer of `stagevar.models.vq`."""
