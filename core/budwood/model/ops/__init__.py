"""Operations of a model: a torch reference each, kernels beside it."""
