"""The operations as functions of tensors."""

from sabmn_ext.ops.attention import attention_map, self_attention2d
from sabmn_ext.ops.spectral_norm import spectral_norm

__all__ = ["attention_map", "self_attention2d", "spectral_norm"]
