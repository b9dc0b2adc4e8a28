"""The HTTP server: a live engine behind OpenAI's API. Needs the extra `serve`; only `budwood serve` imports it."""
