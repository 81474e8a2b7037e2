"""Serves a profile over HTTP as OpenAI's images endpoint is spoken; needs the extra [serve]. See docs/serving.md."""
