"""Serves a profile over HTTP with OpenAI's images API; needs the extra [serve]. See docs/serving.md."""
