"""Retrieval: exact evaluation of features or distances, and feature extraction."""

from sabmn_ext.retrieval.evaluation import evaluate_distances, evaluate_retrieval
from sabmn_ext.retrieval.reranking import rerank
from sabmn_ext.retrieval.result import RetrievalResult
from sabmn_ext.retrieval.search import topk

__all__ = ["RetrievalResult", "evaluate_distances", "evaluate_retrieval", "rerank", "topk"]
