"""How much a file may ask for, each limit with what honest files need.

Files made to harm ask for a thousand times what honest ones do, so no limit here is tight.
"""

from __future__ import annotations

__all__ = [
    "ARGUMENTS",
    "CHILD_DATA",
    "CHILD_MEMORY",
    "CHILD_OF_FILES",
    "CHILD_OF_SAMPLES",
    "CHILD_SECONDS",
    "CONSTANT_ELEMENTS",
    "DIMENSIONS",
    "FILE_BYTES",
    "INPUTS",
    "JSON_BYTES",
    "NODES",
    "PICKLE_DEPTH",
    "PICKLE_OPCODES",
    "PICKLE_PARTS",
    "PICTURE_PIXELS",
    "SAMPLES_BYTES",
    "SAMPLES_RATIO",
    "SAMPLES_SMALL",
    "SAMPLE_ELEMENTS",
    "TABLES",
    "TEXT",
    "VALUES_BYTES",
]

# Files as a whole. A protobuf, and with it an ONNX file, ends at 2 GiB; ResNet-152 takes 240 MB in float32.
FILE_BYTES = 4 << 30

# JSON: manifests, metadata. Tables of run-time files are a few bytes for each weight of the network.
JSON_BYTES = 64 << 20
TEXT = 10_000  # characters of a name or a path

INPUTS = 64  # of a network; detectors and language models have fewer than ten
ARGUMENTS = 2_000  # values that a network is built with; ours have five

# Pickles.
PICKLE_OPCODES = 500_000  # some ten thousand tensors; ResNet-50 with eight BatchNorms for each has three thousand
PICKLE_DEPTH = 100  # a checkpoint has a dozen
PICKLE_PARTS = 10_000_000  # with what is shared counted as often as it is reached

# Exported networks.
NODES = 100_000  # operators of a graph; ResNet-50 at run time has two thousand
TABLES = 2_000_000  # of a flatbuffer, what is shared counted as often as it is reached; the same has thirty thousand
VALUES_BYTES = 1 << 30  # values that are there at once; all weights of ViT-B in float32 take a third of it
DIMENSIONS = 16  # of a tensor; attention has five, and NumPy takes 64
BATCH = 1 << 10  # samples that a TFLite file takes at once
CONSTANT_ELEMENTS = 1 << 26  # of a constant that is computed from others; the largest filter of ResNet-50 has 2 million

# Samples.
SAMPLE_ELEMENTS = 1 << 22  # of one sample, 16 MiB in float32: 3 x 1024 x 1024 is below it; layers make hundreds of it
SAMPLES_BYTES = 4 << 30  # what samples, or the rest that tqexport split leaves, may unpack to,
SAMPLES_RATIO = 200  # as a multiple of their file (a black picture shrinks to a thousandth, pictures to a half),
SAMPLES_SMALL = 256 << 20  # unless it is not much anyway
PICTURE_PIXELS = 1 << 26  # of one picture before it is scaled; cameras make 50 million

# A process of its own that runs somebody's file.
CHILD_MEMORY = 8 << 30  # address space; libraries alone map two of it
CHILD_DATA = 512 << 20  # what it may use besides; onnxruntime and LiteRT take 80 MiB of it, with PyTorch 200,
CHILD_OF_FILES = 64  # as a multiple of the files that are open: constants are copied, packed and computed from others,
CHILD_OF_SAMPLES = 10_000  # and of samples; ResNet-20 keeps 830 times as much, with five times the channels 4,000
CHILD_SECONDS = 600.0  # for one answer: a batch of samples through a large network without optimisations
