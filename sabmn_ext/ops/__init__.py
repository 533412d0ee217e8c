"""The operations: one file each, with schema, checks, dispatch and autograd. ``reference`` is the specification."""

from sabmn_ext.ops import attention, batch_norm, convolution, reference, rerank, retrieval, spectral_norm

__all__ = ["attention", "batch_norm", "convolution", "reference", "rerank", "retrieval", "spectral_norm"]
