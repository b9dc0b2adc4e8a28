"""The live engine: one thread owns a model and its adapters, and answers in batches; the pool and what opens one."""
