"""The specification of every operation in plain torch, in any floating dtype and on any device.

The kernels are tested against these functions in float64, and an operation falls back to them where no kernel serves.
"""
