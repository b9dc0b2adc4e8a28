"""Guards against untrusted input: safetensors headers, JSON, names and paths, redaction, the template sandbox."""
