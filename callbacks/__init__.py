"""Callbacks: when things happen, and what is logged."""

from typing import TYPE_CHECKING

from lit_logits.lazy import lazy_names

if TYPE_CHECKING:
    from lit_logits.callbacks.atomic_checkpoints import AtomicCheckpointIO
    from lit_logits.callbacks.codebook_fit import CodebookFit
    from lit_logits.callbacks.codebook_monitor import CodebookMonitor
    from lit_logits.callbacks.codebook_reassign import CodebookReassign
    from lit_logits.callbacks.codebook_reinit import CodebookReinit
    from lit_logits.callbacks.confusion_matrix_logger import ConfusionMatrixLogger
    from lit_logits.callbacks.exact_resume import ExactResume
    from lit_logits.callbacks.fusion_calibration_writer import FusionCalibrationWriter
    from lit_logits.callbacks.fusion_weight_logger import FusionWeightLogger
    from lit_logits.callbacks.gw_approximation_logger import GWApproximationLogger
    from lit_logits.callbacks.json_lines_writer import JsonLinesWriter
    from lit_logits.callbacks.last_checkpoint import LastCheckpoint
    from lit_logits.callbacks.line_progress import LineProgress
    from lit_logits.callbacks.logit_cache_writer import LogitCacheWriter
    from lit_logits.callbacks.neural_collapse_monitor import NeuralCollapseMonitor
    from lit_logits.callbacks.prediction_writer import PredictionWriter
    from lit_logits.callbacks.resume_check import ResumeCheck
    from lit_logits.callbacks.sample_text_logger import SampleTextLogger
    from lit_logits.callbacks.save_pretrained import SavePretrained
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "lit_logits.callbacks.atomic_checkpoints": "AtomicCheckpointIO",
            "lit_logits.callbacks.codebook_fit": "CodebookFit",
            "lit_logits.callbacks.codebook_monitor": "CodebookMonitor",
            "lit_logits.callbacks.codebook_reassign": "CodebookReassign",
            "lit_logits.callbacks.codebook_reinit": "CodebookReinit",
            "lit_logits.callbacks.confusion_matrix_logger": "ConfusionMatrixLogger",
            "lit_logits.callbacks.exact_resume": "ExactResume",
            "lit_logits.callbacks.fusion_calibration_writer": "FusionCalibrationWriter",
            "lit_logits.callbacks.fusion_weight_logger": "FusionWeightLogger",
            "lit_logits.callbacks.gw_approximation_logger": "GWApproximationLogger",
            "lit_logits.callbacks.json_lines_writer": "JsonLinesWriter",
            "lit_logits.callbacks.last_checkpoint": "LastCheckpoint",
            "lit_logits.callbacks.line_progress": "LineProgress",
            "lit_logits.callbacks.logit_cache_writer": "LogitCacheWriter",
            "lit_logits.callbacks.neural_collapse_monitor": "NeuralCollapseMonitor",
            "lit_logits.callbacks.prediction_writer": "PredictionWriter",
            "lit_logits.callbacks.resume_check": "ResumeCheck",
            "lit_logits.callbacks.sample_text_logger": "SampleTextLogger",
            "lit_logits.callbacks.save_pretrained": "SavePretrained",
        },
    )

__all__ = [
    "AtomicCheckpointIO",
    "CodebookFit",
    "CodebookMonitor",
    "CodebookReassign",
    "CodebookReinit",
    "ConfusionMatrixLogger",
    "ExactResume",
    "FusionCalibrationWriter",
    "FusionWeightLogger",
    "GWApproximationLogger",
    "JsonLinesWriter",
    "LastCheckpoint",
    "LineProgress",
    "LogitCacheWriter",
    "NeuralCollapseMonitor",
    "PredictionWriter",
    "ResumeCheck",
    "SampleTextLogger",
    "SavePretrained",
]
