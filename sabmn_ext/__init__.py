"""Self-attention multi-branch network for person re-identification: operations, network, training, evaluation.

>>> import sabmn_ext
>>> block = sabmn_ext.SelfAttention2d(256)                  # drop-in for any network
>>> network = sabmn_ext.SABMN(751, weights="none")          # the paper's network
>>> result = sabmn_ext.evaluate_retrieval(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids)
"""

from sabmn_ext import functional, ops
from sabmn_ext.nn.attention import SelfAttention2d
from sabmn_ext.nn.sabmn import SABMN
from sabmn_ext.nn.spectral_norm import remove_spectral_norm, spectral_norm, spectral_norm_model
from sabmn_ext.retrieval import RetrievalResult, evaluate_distances, evaluate_retrieval, rerank, topk
from sabmn_ext.retrieval.extractor import Extractor

__version__ = "0.1.0"

__all__ = [
    "SABMN",
    "Extractor",
    "RetrievalResult",
    "SelfAttention2d",
    "evaluate_distances",
    "evaluate_retrieval",
    "functional",
    "ops",
    "remove_spectral_norm",
    "rerank",
    "spectral_norm",
    "spectral_norm_model",
    "topk",
]
