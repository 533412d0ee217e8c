"""The operations as functions of tensors."""

from sabmn_ext.ops.attention import attention_map, self_attention2d

__all__ = ["attention_map", "self_attention2d"]
