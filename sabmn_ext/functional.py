"""The operations as functions of tensors."""

from sabmn_ext.ops.attention import attention_map, self_attention2d
from sabmn_ext.ops.batch_norm import batch_norm_act
from sabmn_ext.ops.convolution import conv1x1, conv3x3
from sabmn_ext.ops.spectral_norm import spectral_norm

__all__ = ["attention_map", "batch_norm_act", "conv1x1", "conv3x3", "self_attention2d", "spectral_norm"]
