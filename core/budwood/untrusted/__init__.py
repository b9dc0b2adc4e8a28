"""Guards against untrusted input: safetensors headers, JSON, names and paths, redaction, chat template sandbox."""
