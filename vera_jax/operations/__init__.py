"""Operations of networks, and how kernels are stored; no word of models."""
