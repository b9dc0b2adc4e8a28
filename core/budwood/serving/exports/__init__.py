"""Exports of an adapter for other programs: PEFT, vLLM, llama.cpp, Ollama, or a merged model."""
