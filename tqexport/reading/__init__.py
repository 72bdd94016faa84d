"""The door for bytes from strangers: bounded, typed reading, whose every refusal is an ``InputError``.

``limits.py`` has all limits, ``files.py`` opens files, ``records.py`` reads JSON and fields of known types,
``pickles.py`` walks pickles before anything is built of them, and ``apart.py`` runs what may end its process in a
process of its own. The formats check their own structure (``backends/onnx/door.py``, ``backends/tflite/door.py``).
"""
