"""Self-attention multi-branch network for person re-identification: operations, network, training, evaluation."""

__version__ = "0.1.0"
