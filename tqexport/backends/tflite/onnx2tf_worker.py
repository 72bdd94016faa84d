"""Runs onnx2tf and the TFLite converter: ``python -m tqexport.backends.tflite.onnx2tf_worker IN OUT [IN OUT ...]``.

A process of its own, because onnx2tf calls ``sys.exit``, writes into the working folder, prints to both streams and
brings in TensorFlow. The caller gives it a temporary working folder and reads the files that it leaves.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from tqexport.backends.tflite.onnx2tf_trials import mend_trials, samples_for_trials, save_array

# onnx2tf downloads this file when an input looks like an image and it is not in the working folder.
_CALIBRATION = "calibration_image_sample_data_20x128x128x3_float32.npy"

ENVIRONMENT = {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0", "CUDA_VISIBLE_DEVICES": "-1"}


def main(arguments: list[str]) -> None:
    """Convert each float ONNX file to a float TFLite file."""
    os.environ.update(ENVIRONMENT)
    threading.Thread(target=_end_with_caller, daemon=True).start()
    save_array(Path(_CALIBRATION), np.zeros((20, 128, 128, 3), np.float32))
    mend_trials()
    for source, target in zip(arguments[::2], arguments[1::2], strict=True):
        Path(target).write_bytes(_convert(source))


def _end_with_caller() -> None:
    """End this process when the one that started it has ended, in whatever way."""
    os.read(sys.stdin.fileno(), 1)  # waits for the end of a pipe that nobody writes to
    os._exit(1)


def _convert(source: str) -> bytes:
    """The float TFLite file of one float ONNX file."""
    import onnx2tf
    import tensorflow as tf
    import tf_keras

    tf_keras.backend.clear_session()  # operator names count from zero for every file
    network: Any = onnx2tf.convert(
        input_onnx_file_path=source,
        output_folder_path="onnx2tf",
        # None of these change the network: the graph is simplified already, and only the Keras model is wanted.
        not_use_onnxsim=True,
        disable_model_save=True,
        verbosity="error",
        custom_input_op_name_np_data_path=samples_for_trials(Path(source)),
    )
    inputs = [tf.TensorSpec(value.shape, value.dtype, name=value.name) for value in network.inputs]
    function = tf.function(lambda *values: network(values)).get_concrete_function(*inputs)
    converted: bytes = tf.lite.TFLiteConverter.from_concrete_functions([function], tf.Module()).convert()
    return converted


if __name__ == "__main__":
    main(sys.argv[1:])
