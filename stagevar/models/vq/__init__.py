"""The vector-quantized tokenizer that VAR and STAR share, and the loader of both."""
