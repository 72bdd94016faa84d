"""The commands that are disturbed."""

from __future__ import annotations

from dataclasses import dataclass

INPUTS = ("ckpt.pt", "int.pt", "other.pt", "data.npz", "given", "parts", "web")  # which no command may touch
VARIES = ("report.html",)  # with the clock, so that only its end is looked at
GROWS = ("counts.jsonl",)  # line by line, so that a beginning of it is right


@dataclass(frozen=True)
class Command:
    """A command to disturb.

    Attributes:
        line: What is typed.
        before: What is typed before, undisturbed, once for all trials.
        starts: Whether it starts other processes.
    """

    line: str
    before: tuple[str, ...] = ()
    starts: bool = False


COMMANDS = {
    "onnx": Command("onnx ckpt.pt --bits 1,4,8 -o out"),
    "onnx again": Command("onnx ckpt.pt --bits 4,8 -o out", ("onnx other.pt --bits 4,8 -o out",)),
    "onnx runtime": Command("onnx ckpt.pt --bits runtime -o out"),
    "c": Command("c int.pt --bits 2,4 -o out"),
    "convert": Command("convert ckpt.pt new/net.pt"),
    "convert safetensors": Command("convert ckpt.pt new/net.safetensors"),
    "truncate": Command("truncate given/ckpt.onnx -o out", ("onnx ckpt.pt --bits 8 -o out",)),
    "calibrate": Command("calibrate ckpt.pt --data data.npz -o new/int.pt"),
    "gap": Command("gap ckpt.pt --plot gap.png"),
    "verify": Command("verify given --bits 4 --runtime onnxruntime --attest new/statement.json"),
    "page": Command("page ckpt.pt --data data.npz --onnxruntime-web web -o page"),
    "page again": Command(
        "page ckpt.pt --data data.npz --onnxruntime-web web -o page", ("page other.pt --onnxruntime-web web -o page",)
    ),
    "split": Command("split given/ckpt.onnx -o out"),
    "join": Command(
        "join parts/ckpt-w2-exact-packed.onnx parts/ckpt-w2-rest.zip -o out", ("split given/ckpt.onnx -o parts",)
    ),
    "tflite": Command("tflite given --bits 4 -o out", starts=True),
    "evaluate": Command(
        "evaluate given --bits 4 --runtime onnxruntime --data data.npz --workers 1 --resume counts.jsonl "
        "--report report.html",
        starts=True,
    ),
}
